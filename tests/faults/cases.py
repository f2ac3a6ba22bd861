"""Every fault, at every point.

Each case is a function of a stage and a try. It ends with a judgement, or raises where the story itself went wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.faults.delays import (
    messages_are_lost,
    messages_come_twice_and_late,
    worker_freezes,
    worker_freezes_and_its_files_are_collected,
    writer_freezes_and_its_files_are_collected,
)
from tests.faults.ground import (
    clock_is_set_back,
    database_restarts,
    derived_column_is_damaged,
    disk_is_full,
    disk_is_full_for_a_write,
    served_column_is_damaged,
    served_file_is_gone,
    source_column_is_damaged,
    two_start_at_once,
)
from tests.faults.kills import (
    compacting_worker_dies,
    crowded_api_dies,
    fitting_api_dies,
    fitting_worker_dies,
    indexing_worker_dies,
    searching_api_dies,
    starting_api_dies,
    verb_dies,
    worker_dies,
    writing_api_dies,
)
from tests.faults.shared import SEVERAL
from tests.faults.stage import Judgement, Play


@dataclass(frozen=True)
class Case:
    """One try."""

    fault: str
    point: str
    play: Play
    #: whether it can come where messages are files and the database is one
    embedded: bool = True


_WORKER = {
    **dict.fromkeys(["lease", "lease.committed", "read", "written", "publish", "publish.committed"], (1, 3)),
    **dict.fromkeys(["transform", "write_column", "sync", "rename", "build_index"], (1, 2, 4)),
    **dict.fromkeys(["validate", "validate.committed", "cutover", "cutover.committed", "refresh"], (1,)),
}
_UPSERT = {
    **dict.fromkeys(["write_column", "sync", "rename"], (1, 2, 3)),
    **dict.fromkeys(["written", "upsert", "upsert.committed"], (1,)),
}
_VERBS = {
    "cutover": ("awaiting_cutover", "completed"),
    "cancel": ("awaiting_cutover", "cancelled"),
    "rollback": ("completed", "rolled_back"),
    "finalize": ("completed", "finalized"),
}


def cases() -> Iterator[Case]:
    """The whole matrix."""
    yield from _worker_kills()
    yield from _writing_kills()
    yield from _api_kills()
    for point in ("read", "transform", "write_column", "rename", "build_index"):
        yield Case("a worker is frozen", point, partial(worker_freezes, point=f"{point}:stop:1"))
        # With two segments under way it may be frozen in a transaction, whose locks only PostgreSQL takes away.
        frozen = partial(worker_freezes, point=f"{point}:stop:2")
        yield Case("a worker is frozen", f"{point}, again", frozen, embedded=False)
    yield Case("frozen, and gc", "written", partial(worker_freezes_and_its_files_are_collected, point="written:stop:2"))
    for point, embedded in (("written", True), ("upsert", False)):  # SQLite lets nobody write beside a frozen writer
        frozen = partial(writer_freezes_and_its_files_are_collected, point=f"{point}:stop:1")
        yield Case("frozen, and gc", f"{point} (upsert)", frozen, embedded=embedded)
    yield Case("messages twice and late", "-", messages_come_twice_and_late)
    yield Case("Redis flushed and restarted", "-", messages_are_lost, embedded=False)
    for crash in (False, True):
        how = "crashes" if crash else "restarts"
        yield Case(f"the database {how}", "-", partial(database_restarts, crash=crash), embedded=False)
    for point in ("write_column", "sync", "build_index"):
        yield Case("disk full", point, partial(disk_is_full, point=f"{point}:full:3"))
    for point in ("write_column", "sync"):
        yield Case("disk full", f"{point} (upsert)", partial(disk_is_full_for_a_write, point=f"{point}:full:2"))
    yield Case("a derived column damaged", "verify", derived_column_is_damaged)
    for which in ("column", "index"):
        yield Case(f"a derived {which} gone", "verify", partial(served_file_is_gone, which=which))
    yield Case("a served column damaged", "verify", served_column_is_damaged)
    yield Case("a source column damaged", "read", source_column_is_damaged)
    yield Case("clock set back", "lease.committed", clock_is_set_back)
    for _ in range(SEVERAL):
        yield Case("two start at once", "-", two_start_at_once)


def _worker_kills() -> Iterator[Case]:
    for point, times in _WORKER.items():
        for nth in times:
            yield _kill(worker_dies, point, "worker", nth)
    for point in ("index", "index.committed"):
        yield _kill(indexing_worker_dies, point, "worker")
    for point in ("repair", "repair.committed"):
        yield _kill(derived_column_is_damaged, point, "worker")
    for point in ("fit_lease", "fit_lease.committed", "sync", "rename", "fit_complete", "fit_complete.committed"):
        yield _kill(fitting_worker_dies, point, "fit")
    for point in ("compact", "compact.committed"):
        yield _kill(compacting_worker_dies, point, "worker")


def _writing_kills() -> Iterator[Case]:
    for point, times in _UPSERT.items():
        for nth in times:
            yield _kill(writing_api_dies, point, "upsert", nth)
    for point in ("rename", "written", "upsert", "upsert.committed"):
        yield _kill(crowded_api_dies, point, "upserts of many", 5)
    for point in ("transform", "write_column", "upsert"):
        yield _kill(writing_api_dies, point, "upsert, upgraded", upgraded=True)
    for point in ("delete", "delete.committed"):
        yield _kill(writing_api_dies, point, "delete", deletes=True)


def _api_kills() -> Iterator[Case]:
    for point in ("refresh", "transform"):
        yield _kill(searching_api_dies, point, "search", 2)
    for point in ("start", "start.committed"):
        yield _kill(starting_api_dies, point, "start")
    for point in ("write_column", "fit_start", "fit_start.committed"):
        yield _kill(fitting_api_dies, point, "fit")
    for verb, (before, after) in _VERBS.items():
        for point in (verb, f"{verb}.committed"):
            yield _kill(verb_dies, point, verb, verb=verb, before=before, after=after)


def _kill(play: Callable[..., Judgement], point: str, who: str, nth: int = 1, **more: Any) -> Case:
    return Case("kill -9", f"{point} ({who})", partial(play, point=f"{point}:kill:{nth}", **more))
