"""What a worker does: everything that is due, one small step after another.

Any worker may do any step, and doing one twice is doing it once, so messages may be lost, repeated, late or in any order.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

import structlog
from celery import Celery
from sqlalchemy.exc import OperationalError
from ulid import ULID

from gallery import errors, fits, fitting, orphans, repair
from gallery.catalog.compactions import Looked
from gallery.compact import merge
from gallery.compact.plan import Rule
from gallery.heartbeat import Stopped
from gallery.indexing import index_column, wanting
from gallery.search.run import Searcher
from gallery.snapshot import Galleries
from gallery.store import Store
from gallery.upgrade import drive, segment
from gallery.upgrade.refinement import Refinements
from workers.app import WORK
from workers.fitting import fit_pairs
from workers.memory import give_back
from workers.settings import WorkerSettings

log = structlog.get_logger()
_SWEEP_FILES_SECONDS = 600
_AGAIN_SECONDS = 60.0
_INDEXES_LOOKED_FOR = 16
# An upgrade makes way for a piece of other work after so long, or after so many times what the last one took.
_TURN_SECONDS = 5.0
_TURN_PART = 4
T = TypeVar("T")


class Worker:
    """One process that does what is due."""

    def __init__(
        self,
        store: Store,
        settings: WorkerSettings,
        fit: fits.Fit = fit_pairs,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Work on `store`; `fit` trains transformations, and `clock` says when something is done once more."""
        self.store = store
        self.settings = settings
        self._fit = fit
        self._clock = clock
        #: unique per process, so that a lease of a process that died is never taken for one's own
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{str(ULID())[-6:]}"
        self.stopping = False
        # Which may be put into by a signal's handler, whatever that interrupts; an event must not be set while it is being set.
        self._nudges: SimpleQueue[None] = SimpleQueue()
        self._galleries = Galleries(store.catalog, store.files, only_asked_for=True)
        self._searcher = Searcher.of(store)
        self._refinements = Refinements(store, self._galleries, self._searcher)
        self._rule = Rule(settings.compact_segments, settings.compact_rows)
        #: galleries that had nothing to merge, as they were then
        self._compact: set[Looked] = set()
        #: columns whose index could not be built, galleries that could not be merged, and when that is tried again
        self._unindexed: dict[int, float] = {}
        self._unmerged: dict[int, float] = {}
        self._swept = self._tidied = clock()
        #: what upgrades and fits keep waiting, and when one piece of it is done in spite of them
        self._waiting = deque([self._index_one, self._compact_one])
        self._next_turn = clock() + _TURN_SECONDS

    def nudge(self) -> None:
        """Let it look for work at once."""
        self._nudges.put(None)

    def stop(self) -> None:
        """Let the step under way be the last; for a signal's handler too."""
        self.stopping = True
        self.nudge()

    def nudged(self, seconds: float) -> bool:
        """Wait for a nudge, for so long at most; whether one came. Many at once are one."""
        try:
            self._nudges.get(timeout=seconds)
        except Empty:
            return False
        while not self._nudges.empty():
            self._nudges.get()
        return True

    def has_work(self) -> bool:
        """Whether anything is due now."""
        return bool(
            drive.due(self.store)
            or self._wants_index()
            or self._wants_merges()
            or self._reclaimable()
            or self._refinements.due()
            or fitting.due(self.store)
        )

    def next_look(self, seconds: float) -> float:
        """In how many seconds to look again where nothing is due now: in so many, or once a throttle lets an upgrade go on."""
        until = segment.due_in(self.store)
        return seconds if until is None else min(seconds, until)

    def work(self) -> None:
        """Do what is due until nothing is, or the process is told to stop: then the step under way is the last.

        A step that fails costs itself: the others go on. What nothing needs any more is removed last of all, and meanwhile
        too, because where there is much to do there is no last of all.
        """
        try:
            while not self.stopping:
                if not (self._pressing() or self._compact_one() or self._measure_one() or self._fit_one()):
                    break
        finally:
            if not self.stopping:
                self._tidy()

    def _pressing(self) -> bool:
        """What comes before the rest: what has waited for long enough, else what is urgent."""
        if self._tidy_due():
            self._tidy()
        return self._turn() or self._urgent()

    def _turn(self) -> bool:
        """Now and then, one piece of what upgrades and fits keep waiting; each kind comes first in turn."""
        began = self._clock()
        if began < self._next_turn:
            return False
        self._waiting.rotate()
        moved = any(piece() for piece in self._waiting)
        self._put_off_turn(began)
        return moved

    def _wants_turn(self) -> bool:
        """Whether an upgrade shall make way. That is looked for now and then only, as each look plans merges."""
        began = self._clock()
        if began < self._next_turn:
            return False
        wants = bool(self._wants_index()) or self._wants_merges() or (self._tidy_due() and self._reclaimable())
        if not wants:
            self._put_off_turn(began)
        return wants

    def _put_off_turn(self, began: float) -> None:
        """By so long that an upgrade keeps most of the time, however long a piece of other work takes."""
        ended = self._clock()
        self._next_turn = ended + max(_TURN_SECONDS, _TURN_PART * (ended - began))

    def _tidy_due(self) -> bool:
        return self._clock() - self._tidied >= self.settings.retired_seconds

    def _tidy(self) -> None:
        """Remove what nothing needs any more."""
        self._tidied = self._clock()
        self._tried(lambda: merge.reclaim(self.store, self.settings.retired_seconds), "reclaim")
        self._tried(self._let_go, "let_go")
        self._sweep_files()

    def _tried(self, step: Callable[[], T], of: str, **which: object) -> T | None:
        """What a step gave; None where it failed, for whatever reason: a full disk must not stop what would empty it."""
        try:
            return step()
        except (errors.GalleryError, FileNotFoundError) as error:
            log.warning("step_refused", step=of, error=repr(error), **which)
            repair.attempt(self.store, error)
        except Exception:
            log.exception("step_failed", step=of, **which)
        return None

    def _let_go(self) -> None:
        """Let what was removed meanwhile give its place on the disk back."""
        if not drive.under_way(self.store):
            self._galleries.let_go()
        elif self._galleries.current.galleries:
            self._galleries.refresh()

    def _urgent(self) -> bool:
        """What people wait for: a step of each upgrade, else an index; False if there is nothing of it to do now."""
        moved = False
        for upgrade_id in drive.due(self.store):
            if self.stopping:
                return moved
            moved |= self._advance(upgrade_id)
        return moved or self._index_one()

    def _advance(self, upgrade_id: str) -> bool:
        def step() -> bool:
            return drive.advance(
                self.store,
                self._galleries,
                self._searcher,
                upgrade_id,
                self.owner,
                partial(self._another, upgrade_id),
                self._between,
            )

        return bool(self._tried(step, "upgrade", upgrade=upgrade_id))

    def _between(self) -> None:
        """While everything of a gallery is read: what that keeps waiting has its turn, too."""
        if self.stopping:
            raise Stopped
        self._turn()

    def _another(self, upgrade_id: str) -> bool:
        """Whether an upgrade may go on with another segment: nothing else has its turn, and the process is not told to stop."""
        give_back()
        return not (self.stopping or drive.another_due(self.store, upgrade_id) or self._wants_turn())

    def _index_one(self) -> bool:
        """Build one index. A column that is gone meanwhile is no error, and one that cannot be read stops no other."""
        for column_id in self._wants_index():
            built = self._tried(partial(index_column, self.store, column_id), "index", column=column_id)
            if built:
                return True
            if built is None:
                self._unindexed[column_id] = self._clock() + _AGAIN_SECONDS
        return False

    def _wants_index(self) -> list[int]:
        """Columns that want an index, without those for which it was tried in vain of late."""
        self._unindexed = _to_come(self._unindexed, self._clock())
        found = wanting(self.store, limit=len(self._unindexed) + _INDEXES_LOOKED_FOR)
        return [column for column in found if column not in self._unindexed]

    def _compact_one(self) -> bool:
        """Merge one group of segments; whatever is more urgent is looked for before the next."""
        for look in self._looked():
            planned, merged = self._planned(look), list[bool | None]()
            for segments in planned.merges:
                merged.append(self._merge(look, segments))
                if merged[-1]:
                    return True
            if None in merged:
                self._unmerged[look.gallery_id] = self._clock() + _AGAIN_SECONDS
                continue
            # What is held or was refused is left to merge: that is looked at again once anything of the gallery has changed.
            if look.asked_at is not None and not planned.held and not merged:
                merge.answered(self.store, look)
            self._compact.add(look)
        return False

    def _measure_one(self) -> bool:
        """One more point of what a refinement is worth."""
        return any(
            self._tried(partial(self._refinements.look, upgrade_id), "refinement", upgrade=upgrade_id)
            for upgrade_id in self._refinements.due()
        )

    def _fit_one(self) -> bool:
        """Take one fit to its end. A training takes minutes, so it makes way for whatever is urgent between two steps."""
        return any(
            self._tried(
                partial(fitting.advance, self.store, fit_id, self.owner, self._fit, self._go_on), "fit", fit=fit_id
            )
            for fit_id in fitting.due(self.store)
        )

    def _go_on(self) -> bool:
        """Do what comes before a fit; whether there is time for the rest then."""
        while not self.stopping and self._pressing():
            pass
        return not self.stopping

    def _reclaimable(self) -> bool:
        return merge.reclaimable(self.store, self.settings.retired_seconds)

    def _wants_merges(self) -> bool:
        return any(self._wants_merge(look) for look in self._looked())

    def _wants_merge(self, look: Looked) -> bool:
        planned = self._planned(look)
        wants = bool(planned.merges) or (look.asked_at is not None and not planned.held)
        if not wants:
            self._compact.add(look)
        return wants

    def _looked(self) -> list[Looked]:
        """Galleries that changed since nothing was found to merge in them, without those that failed of late."""
        self._unmerged = _to_come(self._unmerged, self._clock())
        found = merge.looked(self.store)
        self._compact.intersection_update(found)
        return [look for look in found if look not in self._compact and look.gallery_id not in self._unmerged]

    def _planned(self, look: Looked) -> merge.Planned:
        return merge.planned(self.store, look, self._rule)

    def _merge(self, look: Looked, segments: tuple[int, ...]) -> bool | None:
        """Merge some segments; False where that is refused, None where it may go well another time."""

        def step() -> bool | None:
            try:
                return merge.merge(self.store, look.gallery_id, segments)
            except (errors.GalleryError, FileNotFoundError) as error:
                log.warning("step_refused", step="merge", gallery=look.gallery_id, error=repr(error))
                return None if repair.attempt(self.store, error) else False

        return self._tried(step, "merge", gallery=look.gallery_id, segments=segments)

    def _sweep_files(self) -> None:
        """Now and then, remove what crashes left behind."""
        if self._clock() - self._swept < _SWEEP_FILES_SECONDS:
            return
        self._swept = self._clock()
        for folder in orphans.FOLDERS:
            try:
                removed = orphans.remove(
                    self.store.catalog, self.store.files, folder, older_than=self.settings.orphan_seconds
                )
            except OperationalError as error:  # somebody has been writing for long; the next time will do
                log.warning("orphans_left", folder=folder, error=repr(error))
                return
            if removed:
                log.info("orphans_removed", folder=folder, files=len(removed))


def _to_come(moments: Mapping[int, float], moment: float) -> dict[int, float]:
    """Those whose moment has not come yet."""
    return {of: at for of, at in moments.items() if at > moment}


def register(app: Celery, worker: Worker) -> None:
    """Let the app's one task wake this worker. It is over at once: Celery goes on listening, to signals too."""

    @app.task(name=WORK)  # type: ignore[untyped-decorator,unused-ignore]
    def work() -> None:
        worker.nudge()


def watch(worker: Worker, seconds: float) -> threading.Thread:
    """The one thread that works: at once after a nudge, and by itself what it finds due, first at once, then each `seconds`.

    So the loss of a message costs `seconds` and nothing else, and so does that of the queue. It is one thread whoever asks,
    as each that computes keeps threads and memory of its own.
    """

    def look() -> None:
        wait = 0.0
        while not worker.stopping:
            nudged, wait = worker.nudged(wait), seconds
            try:
                if nudged or worker.has_work():
                    worker.work()
                wait = worker.next_look(seconds)
            except Exception as error:  # noqa: BLE001 - the database may be restarting; the next look will tell
                log.warning("look_failed", error=repr(error))

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    return thread
