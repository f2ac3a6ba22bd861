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
from gallery.catalog.compactions import Look
from gallery.catalog.transaction import in_words
from gallery.compact import merge
from gallery.compact.plan import Rule
from gallery.heartbeat import Stopped
from gallery.indexing import index_column, wanting
from gallery.search.run import Searcher
from gallery.snapshot import Galleries
from gallery.store import Store
from gallery.upgrade import drive, segment
from gallery.upgrade.refinement import Refinements
from gallery.upgrade.states import State
from workers.app import WORK
from workers.fitting import fit_pairs
from workers.memory import give_back
from workers.settings import WorkerSettings

log = structlog.get_logger()
_SWEEP_FILES_SECONDS = 600
_AGAIN_SECONDS = 60.0
_INDEXES_LOOKED_FOR = 16
# Upgrades and fits make way for one piece of other work after this time, or after this many times what the last piece took,
# whichever is longer.
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
        """Work on `store`; `fit` trains transformations, and `clock` gives seconds, for what is done now and then."""
        self.store = store
        self.settings = settings
        self._fit = fit
        self._clock = clock
        #: unique per process, so that a lease of a process that died is never taken for one's own
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{str(ULID())[-6:]}"
        self.stopping = False
        # A queue and not an event, since a signal's handler may nudge at any time: it must not set an event that is being set.
        self._nudges: SimpleQueue[None] = SimpleQueue()
        self._galleries = Galleries(store.catalog, store.files, only_asked_for=True)
        self._searcher = Searcher.of(store)
        self._refinements = Refinements(store, self._galleries, self._searcher)
        self._rule = Rule(settings.compact_segments, settings.compact_rows)
        #: galleries that had nothing to merge, as they were then
        self._compact: set[Look] = set()
        #: columns whose index could not be built, and galleries that could not be merged, each with when to try again
        self._unindexed: dict[int, float] = {}
        self._unmerged: dict[int, float] = {}
        self._swept = self._tidied = clock()
        #: other work than upgrades and fits, which would keep it waiting, and when one piece of it is done in spite of them
        self._waiting = deque([self._index_one, self._compact_one])
        #: the same while an upgrade is judged, which keeps those that run waiting too
        self._waiting_for_judge = deque([*self._waiting, self._segment_one])
        self._next_turn = clock() + _TURN_SECONDS
        # The lanes of an upgrade ask in their own threads. What one look finds holds for all of them.
        self._looking = threading.Lock()
        #: the upgrade and the gallery that had the last turn, so that another has the next
        self._advanced_last, self._merged_last = "", 0

    def nudge(self) -> None:
        """Let it look for work at once."""
        self._nudges.put(None)

    def stop(self) -> None:
        """Let the step under way be the last; for a signal's handler too."""
        self.stopping = True
        self.nudge()

    def nudged(self, seconds: float) -> bool:
        """Wait at most so many seconds for a nudge, and say whether one came. Several that came are taken as one."""
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
        """When to look for work again: in `seconds`, or earlier if a throttled upgrade may go on earlier."""
        until = segment.due_in(self.store)
        return seconds if until is None else min(seconds, until)

    def work(self) -> None:
        """Do what is due until nothing is, or until the process is told to stop: then the step under way is the last.

        A step that fails does not keep others from being done. What nothing needs any more is removed at the end, and now and
        then before, since a busy worker never comes to the end.
        """
        try:
            while not self.stopping:
                if not (self._pressing() or self._compact_one() or self._measure_one() or self._fit_one()):
                    break
        finally:
            if not self.stopping:
                self._tidy()

    def _pressing(self) -> bool:
        """Do what comes first: what has waited for too long, else what is urgent. False if there was nothing to do."""
        return self._turn(self._waiting) or self._urgent()

    def _turn(self, waiting: deque[Callable[[], bool]]) -> bool:
        """Now and then, tidy up, and do one piece of the work that is kept waiting. Its kinds take turns in coming first."""
        if self._tidy_due():
            self._tidy()
        began = self._clock()
        if began < self._next_turn:
            return False
        waiting.rotate()
        # A copy: a piece may give turns itself, if it is of an upgrade that has come to be verified meanwhile.
        moved = any(piece() for piece in tuple(waiting))
        self._put_off_turn(began)
        return moved

    def _wants_turn(self) -> bool:
        """Whether an upgrade must make way for other work. It looks only now and then, because each look plans merges."""
        with self._looking:
            began = self._clock()
            if began < self._next_turn:
                return False
            wants = bool(self._wants_index()) or self._wants_merges() or (self._tidy_due() and self._reclaimable())
            if not wants:
                self._put_off_turn(began)
            return wants

    def _put_off_turn(self, began: float) -> None:
        """Set when the next turn is: late enough that upgrades get most of the time, however long a piece takes."""
        ended = self._clock()
        self._next_turn = ended + max(_TURN_SECONDS, _TURN_PART * (ended - began))

    def _tidy_due(self) -> bool:
        return self._clock() - self._tidied >= self.settings.retired_seconds

    def _tidy(self) -> None:
        """Remove what nothing needs any more."""
        self._tidied = self._clock()
        self._tried(lambda: merge.reclaim(self.store, self.settings.retired_seconds), "reclaim")
        self._tried(self._let_go, "let_go")
        self._tried(self._sweep_files, "sweep")

    def _tried(self, step: Callable[[], T], of: str, **which: object) -> T | None:
        """The result of a step; None if it failed, for whatever reason: a full disk must not stop the step that empties it."""
        try:
            return step()
        except (errors.GalleryError, FileNotFoundError) as error:
            log.warning("step_refused", step=of, error=in_words(error), **which)
            repair.attempt(self.store, error)
        except Exception:
            log.exception("step_failed", step=of, **which)
        return None

    def _let_go(self) -> None:
        """Close files that were removed but are still open here, so that the disk gets their space back."""
        if not drive.under_way(self.store):
            self._galleries.let_go()
        elif self._galleries.current.galleries:
            self._galleries.refresh()

    def _urgent(self) -> bool:
        """Do what people wait for: a step of each upgrade, else one index. False if there was nothing to do."""
        moved = False
        for upgrade_id in drive.due(self.store):
            if self.stopping:
                return moved
            moved |= self._advance(upgrade_id, partial(self._another, upgrade_id))
        return moved or self._index_one()

    def _advance(self, upgrade_id: str, more: Callable[[], bool] | None) -> bool:
        """Do the next step of an upgrade; `more` as of `drive.advance`."""
        step = partial(
            drive.advance, self.store, self._galleries, self._searcher, upgrade_id, self.owner, more, self._between
        )
        return bool(self._tried(step, "upgrade", upgrade=upgrade_id))

    def _between(self) -> None:
        """Called in long steps that read a whole gallery: other work has its turn then, too."""
        if self.stopping:
            raise Stopped
        self._turn(self._waiting_for_judge)

    def _segment_one(self) -> bool:
        """Do one segment of an upgrade that runs; of several, each has its turn."""
        running = drive.due(self.store, [State.RUNNING])
        for upgrade_id in sorted(running, key=lambda each: (each <= self._advanced_last, each)):
            self._advanced_last = upgrade_id
            if self._advance(upgrade_id, None):
                return True
        return False

    def _another(self, upgrade_id: str) -> bool:
        """Whether an upgrade may go on with another segment: no other work is due, and the process is not told to stop."""
        give_back()
        return not (self.stopping or drive.another_due(self.store, upgrade_id) or self._wants_turn())

    def _index_one(self) -> bool:
        """Build one index. A column may be gone by now, and one that cannot be read does not keep others from theirs."""
        for column_id in self._wants_index():
            built = self._tried(partial(index_column, self.store, column_id), "index", column=column_id)
            if built:
                return True
            if built is None:
                self._unindexed[column_id] = self._clock() + _AGAIN_SECONDS
        return False

    def _wants_index(self) -> list[int]:
        """Columns that want an index, without those where building it has just failed."""
        self._unindexed = _to_come(self._unindexed, self._clock())
        found = wanting(self.store, limit=len(self._unindexed) + _INDEXES_LOOKED_FOR)
        return [column for column in found if column not in self._unindexed]

    def _compact_one(self) -> bool:
        """Merge one group of segments. Only one, so that more urgent work is looked for before the next."""
        for look in self._looked():
            planned, merged = self._planned(look), list[bool | None]()
            for segments in planned.merges:
                merged.append(self._merge(look, segments))
                if merged[-1]:
                    self._merged_last = look.gallery_id
                    return True
            if None in merged:
                self._unmerged[look.gallery_id] = self._clock() + _AGAIN_SECONDS
                continue
            # Merges that are held or were refused are left over; they are planned again once the gallery has changed.
            if look.asked_at is not None and not planned.held and not merged:
                merge.answered(self.store, look)
            self._compact.add(look)
        return False

    def _measure_one(self) -> bool:
        """Measure one more point of what a refinement is worth."""
        return any(
            self._tried(partial(self._refinements.look, upgrade_id), "refinement", upgrade=upgrade_id)
            for upgrade_id in self._refinements.due()
        )

    def _fit_one(self) -> bool:
        """Take one fit to its end. Training takes minutes, so between two of its steps it makes way for what is urgent."""
        return any(
            self._tried(
                partial(fitting.advance, self.store, fit_id, self.owner, self._fit, self._go_on), "fit", fit=fit_id
            )
            for fit_id in fitting.due(self.store)
        )

    def _go_on(self) -> bool:
        """Do what comes before a fit, and say whether the fit may go on: the process is not told to stop."""
        while not self.stopping and self._pressing():
            pass
        return not self.stopping

    def _reclaimable(self) -> bool:
        return merge.reclaimable(self.store, self.settings.retired_seconds)

    def _wants_merges(self) -> bool:
        return any(self._wants_merge(look) for look in self._looked())

    def _wants_merge(self, look: Look) -> bool:
        planned = self._planned(look)
        wants = bool(planned.merges) or (look.asked_at is not None and not planned.held)
        if not wants:
            self._compact.add(look)
        return wants

    def _looked(self) -> list[Look]:
        """Galleries that changed since they had nothing to merge, without those where a merge has just failed, in turn."""
        self._unmerged = _to_come(self._unmerged, self._clock())
        found = merge.looked(self.store)
        self._compact.intersection_update(found)
        looked = [look for look in found if look not in self._compact and look.gallery_id not in self._unmerged]
        return sorted(looked, key=lambda look: (look.gallery_id <= self._merged_last, look.gallery_id))

    def _planned(self, look: Look) -> merge.Planned:
        return merge.planned(self.store, look, self._rule)

    def _merge(self, look: Look, segments: tuple[int, ...]) -> bool | None:
        """Merge some segments. False if that was refused, None if it failed and may go well another time."""

        def step() -> bool | None:
            try:
                return merge.merge(self.store, look.gallery_id, segments)
            except (errors.GalleryError, FileNotFoundError) as error:
                log.warning("step_refused", step="merge", gallery=look.gallery_id, error=in_words(error))
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
                log.warning("orphans_left", folder=folder, error=in_words(error))
                return
            if removed:
                log.info("orphans_removed", folder=folder, files=len(removed))


def _to_come(moments: Mapping[int, float], moment: float) -> dict[int, float]:
    """Those that are still in the future."""
    return {of: at for of, at in moments.items() if at > moment}


def register(app: Celery, worker: Worker) -> None:
    """Make the app's one task nudge this worker. It returns at once, so that Celery goes on listening, also to signals."""

    # Shared, Celery would give it to every other app of the process too, whose messages would nudge this worker.
    @app.task(name=WORK, shared=False)  # type: ignore[untyped-decorator,unused-ignore]
    def work() -> None:
        worker.nudge()


def watch(worker: Worker, seconds: float) -> threading.Thread:
    """Start the one thread that works. It looks for work at once, after each nudge, and every `seconds` by itself.

    So a lost message, or a broker that is down, costs `seconds` and nothing else. There is only one thread because each that
    computes keeps threads and memory of its own.
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
                log.warning("look_failed", error=in_words(error))

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    return thread
