"""Several segments under way in one process, so that no core waits: for the disk, the catalog, or the end of an index.

A lane is a thread that does one segment after the other, each with a lease, a heartbeat and a fence of its own. To everybody
else it is one more worker, and what holds for several workers holds for it.

A few lanes compute at once, each of which transforms a segment or indexes one. A lane that waits until it may begin another
holds no lease. It may as soon as a segment before it is read to its end, so that is synced while the next is transformed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import structlog

from gallery import errors, repair
from gallery.catalog.transaction import in_words
from gallery.catalog.upgrades import Lease
from gallery.store import Store
from gallery.upgrade import segment

log = structlog.get_logger()
# Lanes beyond those that compute at once. The first index takes long, since its lists are trained. The next column waits for it
# on disk, and the one after that is transformed meanwhile.
_WAITING = 1


class Lanes:
    """The segments of one upgrade that one process does at once. Made for one step, and over when that returns."""

    def __init__(
        self,
        store: Store,
        upgrade_id: str,
        owner: str,
        *,
        published: Callable[[], None],
        more: Callable[[], bool] | None,
    ) -> None:
        """Work as `owner`.

        Args:
            store: where the upgrade is.
            upgrade_id: which.
            owner: who leases the segments.
            published: is called after each segment, by one lane at a time.
            more: whether a lane that has done one segment takes another; None: one segment, in one lane.
        """
        self._store = store
        self._upgrade_id = upgrade_id
        self._owner = owner
        self._published = published
        self._more = more
        most = 1 if more is None else store.settings.segments_at_once
        self._lanes = most + _WAITING if most > 1 else 1
        self._busy = _Busy(most)
        self._turn, self._after = threading.Lock(), threading.Lock()
        self._under_way = threading.Semaphore(self._lanes)
        #: no lane begins another segment
        self._over = False

    def run(self) -> bool:
        """Do segments until none can be leased, or no more are wanted; False if there was none at all."""
        with ThreadPoolExecutor(self._lanes, thread_name_prefix="lane") as threads:
            others = [threads.submit(self._lane) for _ in range(self._lanes - 1)]
            try:
                moved = self._lane()
            finally:
                # Whatever ends this lane before its time, the others end with the segments that they are at.
                self._over = True
        return any([moved, *(other.result() for other in others)])

    def _lane(self) -> bool:
        moved = False
        while not self._over and self._segment():
            moved = True
            if self._more is None or not self._more():
                self._over = True  # a lane that waits for the turn begins nothing
        return moved

    def _segment(self) -> bool:
        """Do one segment; False if there is none to lease now."""
        with ExitStack() as under_way, ExitStack() as at_work, ExitStack() as turn:
            turn.enter_context(self._turn)
            at_work.enter_context(self._busy.at_work())
            held = None if self._over else segment.lease(self._store, self._upgrade_id, self._owner)
            if held is None:
                return False
            under_way.enter_context(_recorded(self._store, held, self._turn))
            under_way.enter_context(segment.renewed(self._store, held))
            for _ in range(self._lanes if held.alone else 1):
                under_way.enter_context(self._under_way)
            if not held.alone:  # else it keeps the turn: what is leased beside it would lose an attempt if it kills us
                turn.close()
            derived = segment.derive(self._store, held, at_work.close)
            at_work.close()
            if derived is not None:
                with self._busy.at_work(indexing=True):
                    if segment.publish(self._store, held, derived):
                        self._busy.indexed = True
        with self._after:
            self._published()
        return True


class _Busy:
    """Limits how many lanes compute at once, for which there are memory and processors; the others wait.

    The first index is built alone: others beside it would train lists of their own, instead of taking over its lists.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._at_work = self._indexing = 0
        #: whether an index was built or tried
        self.indexed = False

    @contextmanager
    def at_work(self, *, indexing: bool = False) -> Iterator[None]:
        """While a segment is transformed, or indexed and published."""
        with self._changed:
            self._changed.wait_for(lambda: self._may_begin(indexing))
            self._at_work += 1
            self._indexing += indexing
        try:
            yield
        finally:
            with self._changed:
                self._at_work -= 1
                self._indexing -= indexing
                self._changed.notify_all()

    def _may_begin(self, indexing: bool) -> bool:
        return self._at_work < self._most and not (indexing and self._indexing and not self.indexed)


@contextmanager
def _recorded(store: Store, held: Lease, turn: threading.Lock) -> Iterator[None]:
    """Record what goes wrong with a segment on its row, so that it does not stop the others.

    Its source may be a damaged column that was itself derived. That is made anew for the next attempt, and before any is leased.
    """
    try:
        yield
    except (errors.LeaseLost, errors.GalleryNotFound):  # nobody wants it any more, or only from whoever has it now
        pass
    except Exception as error:  # noqa: BLE001 - whatever one segment does, the rest goes on
        log.warning("segment_failed", upgrade=held.upgrade_id, segment=held.segment_id, error=in_words(error))
        with turn:
            repair.attempt(store, error)
        with suppress(errors.LeaseLost):  # whoever holds the segment now will record its own
            segment.fail(store, held, in_words(error))
    except BaseException:
        with suppress(errors.LeaseLost):  # it may have been published before the process was told to stop
            segment.release(store, held)
        raise
