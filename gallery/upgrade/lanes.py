"""Several segments under way in one process: while one is transformed, those before it are indexed and published.

A lane is a thread that does one segment after the other, each with a lease, a heartbeat and a fence of its own. To everybody
else it is one more worker, and what holds for several workers holds for it. Only one lane at a time has the turn, in which a
segment is leased and its column is made: two transformations would share the processor, and a lane that waits holds no lease.
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
        self._lanes = 1 if more is None else store.settings.segments_at_once
        self._turn, self._after = threading.Lock(), threading.Lock()
        self._under_way = threading.Semaphore(self._lanes)
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
                break
        return moved

    def _segment(self) -> bool:
        """Do one segment; False if there is none to lease now."""
        with ExitStack() as under_way:
            with self._turn:
                held = segment.lease(self._store, self._upgrade_id, self._owner)
                if held is None:
                    return False
                under_way.enter_context(_recorded(self._store, held, self._turn))
                under_way.enter_context(segment.kept(self._store, held))
                for _ in range(self._lanes if held.alone else 1):
                    under_way.enter_context(self._under_way)
                derived = segment.derive(self._store, held)
            if derived is not None:
                segment.publish(self._store, held, derived)
        with self._after:
            self._published()
        return True


@contextmanager
def _recorded(store: Store, held: Lease, turn: threading.Lock) -> Iterator[None]:
    """What goes wrong with a segment is recorded on its row, and must not stop the others.

    What it is made from may have been derived itself, and is made anew first, in turn, so that the next attempt finds it.
    """
    try:
        yield
    except errors.LeaseLost:
        pass
    except Exception as error:  # noqa: BLE001 - whatever one segment does, the rest goes on
        log.warning("segment_failed", upgrade=held.upgrade_id, segment=held.segment_id, error=repr(error))
        with turn:
            repair.attempt(store, error)
        with suppress(errors.LeaseLost):  # whoever holds the segment now will record its own
            segment.fail(store, held, in_words(error))
    except BaseException:
        with suppress(errors.LeaseLost):  # it may have been published before the process was told to stop
            segment.release(store, held)
        raise
