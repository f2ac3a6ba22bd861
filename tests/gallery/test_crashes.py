"""Every moment at which a process may die, one after the other.

The commit point of each operation is the commit of its last transaction. A process that dies before it leaves what was there
before, one that dies after it what should be there; never a mixture. Then a new process does the operation again or goes on
with it, and reaches the same end as if nothing had happened.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from gallery import errors, removal
from gallery.catalog import items as item_rows
from gallery.catalog.tables import ColumnRow, SegmentRow, UpgradeRow
from gallery.columns import verify
from gallery.compact.merge import reclaim
from gallery.indexing import index_column
from gallery.upgrade import lifecycle
from gallery.upgrade.states import State
from tests.gallery.crash import Bomb, Killed, Stage, leases_run_out, named_files, stored_files, sweep
from tests.gallery.world import WITH_SIDE, World, distance, found

RNG = np.random.default_rng(7)
VECTORS = RNG.integers(-9, 10, (8, 4)).astype(np.float32)
SIDES = RNG.integers(-9, 10, (8, 2)).astype(np.float32)
OTHERS = RNG.integers(-9, 10, (8, 4)).astype(np.float32)
QUERY = {"old": np.array([[3, -1, 4, 1]], np.float32), "new": np.array([[2, 7, -1, 8, 2]], np.float32)}
IDS = [f"i{n}" for n in range(8)]
#: the first of two segments has an index file, in which every row is read
SETTINGS = {"exact_below": 4, "min_candidates": 50}
INDEX = {"kind": "ivf", "nlist": 1, "nprobe": 1}

Operation = Callable[[World], Any]


def _upgrade(world: World) -> str:
    with world.store.catalog.reading() as session:
        return session.scalars(select(UpgradeRow.id)).one()


def _some_side(world: World) -> None:
    """Two new segments, which replace three items and add one."""
    world.upsert(
        "old",
        ["i1", "i2", "i5", "new"],
        OTHERS[:4],
        side=SIDES[:2],
        has_side=[True, False, True, False],
        payloads=[{}] * 4,
    )


def _compact(world: World) -> None:
    """Two segments become one, and their files go at once."""
    world.compact()
    reclaim(world.store, -1)


def _work(world: World) -> None:
    world.run(_upgrade(world), "mortal")


@dataclass(frozen=True)
class Case:
    """What happens, in which state of the gallery, and how a new process goes on after a crash."""

    operation: Operation
    #: steps of a worker before, of an upgrade that was started; None: no upgrade
    steps: int | None = None
    policy: str = "zeros"
    cutover: str = "progressive"
    #: whether what can be seen changes at once, with the last commit
    atomic: bool = True


CASES = {
    "upsert": Case(_some_side),
    "upsert_after_an_upgrade": Case(_some_side, steps=50),
    "delete": Case(lambda world: world.delete("i1", "i5", "nothing")),
    "one_segment": Case(lambda world: world.step(_upgrade(world), "mortal"), steps=2),
    "a_whole_upgrade": Case(_work, steps=0, atomic=False),
    "a_whole_upgrade_at_once": Case(_work, steps=0, cutover="automatic"),
    "cutover": Case(lambda world: lifecycle.cutover(world.store, _upgrade(world)), steps=50, cutover="manual"),
    "cancel": Case(lambda world: lifecycle.cancel(world.store, _upgrade(world)), steps=2),
    "rollback": Case(lambda world: lifecycle.rollback(world.store, _upgrade(world)), steps=50),
    "finalize": Case(lambda world: lifecycle.finalize(world.store, _upgrade(world)), steps=50),
    "delete_gallery": Case(lambda world: removal.delete_gallery(world.store, "photos")),
    "compaction": Case(_compact),
    "compaction_after_an_upgrade": Case(_compact, steps=50),
    "index": Case(lambda world: index_column(world.store, 1)),
}


#: These are made of parts that other cases have, and have many moments: they are killed and no more.
_KILLED_ONLY = {"a_whole_upgrade", "a_whole_upgrade_at_once", "upsert_after_an_upgrade", "compaction_after_an_upgrade"}
DEATHS = [
    pytest.param(name, unwinds, id=f"{name}-{'interrupted' if unwinds else 'killed'}")
    for name in CASES
    for unwinds in (False, True)
    if not (unwinds and name in _KILLED_ONLY)
]


@pytest.mark.parametrize(("name", "unwinds"), DEATHS)
def test_a_crash_leaves_the_state_before_or_after_and_another_process_goes_on(
    name: str, unwinds: bool, tmp_path: Path
) -> None:
    case = CASES[name]
    before, after = _told(case, tmp_path)
    stage = Stage(tmp_path)
    for at in range(500):
        stage.set(tmp_path / "before")
        bomb = Bomb(at, unwinds=unwinds)
        with suppress(Killed):
            case.operation(stage.mortal(bomb, **SETTINGS))
        survivor = stage.open(**SETTINGS)
        _follows(case, bomb, survivor, before, after)
        orphans = stored_files(stage.folder) - named_files(survivor)
        assert sweep(survivor) == orphans
        if bomb.went_off:
            _goes_on(case, survivor)
        assert _picture(survivor) == after, bomb.passed
        sweep(survivor)
        assert stored_files(stage.folder) == named_files(survivor)
        if not bomb.went_off:
            assert at > 2, "no moment to die at was found"
            stage.close()
            return
    pytest.fail("the operation never ends")


def _follows(case: Case, bomb: Bomb, world: World, before: Any, after: Any) -> None:
    """What is there right after the crash."""
    seen = _picture(world)
    if case.atomic:
        assert seen in (before, after), bomb.passed
    if case.atomic and case.steps is None:  # operations of one transaction
        assert seen == (after if bomb.commits else before), bomb.passed
    if seen != "gone":
        _right_in_every_hit(world)
    _verified(world)


def _goes_on(case: Case, world: World) -> None:
    """A new process: leases of the dead end, and the operation is done again."""
    leases_run_out(world.store.catalog)
    with suppress(errors.GalleryNotFound):  # deleted already
        case.operation(world)


def _told(case: Case, folder: Path) -> tuple[Any, Any]:
    """The pictures before and after, when nothing happens in between; the folder before is kept as a template."""
    world = World.open(folder / "whole", **SETTINGS).prepare(("forward", "old", "new", WITH_SIDE), index=INDEX)
    for part in (slice(0, 5), slice(5, 8)):
        world.upsert("old", IDS[part], VECTORS[part], side=SIDES[part], payloads=[{"n": n} for n in range(8)][part])
    world.delete("i4")
    if case.steps is not None:
        upgrade = world.start(on_missing_side_information=case.policy, cutover=case.cutover)
        for _ in range(case.steps):
            if not world.step(upgrade):
                break
    before = _picture(world)
    world.close()
    shutil.copytree(folder / "whole", folder / "before")
    case.operation(world)
    after = _picture(world)
    world.close()
    return before, after


def _picture(world: World) -> Any:
    """All that a client can see, but for the version."""
    try:
        seen = [list(_answer(world, model, others)) for model, others in (("old", ()), ("new", ("old",)), ("new", ()))]
    except errors.GalleryNotFound:
        return "gone"
    with world.store.catalog.reading() as session:
        states = [State(state) for state in session.scalars(select(UpgradeRow.state))]
        final = [
            state for state in states if state in (State.CANCELLED, State.ROLLED_BACK, State.FINALIZED, State.COMPLETED)
        ]
        first = session.get(ColumnRow, 1)
    # An upsert that is done again leaves a segment without a live row behind, which no one sees.
    segments = sum(view.live > 0 for view in world.galleries.current.snapshot("photos").segments)
    return seen, final, first is not None and first.index_file is not None, segments


def _answer(world: World, model: str, others: tuple[str, ...]) -> Iterator[Any]:
    try:
        answer = world.search(model, QUERY[model], companions={other: QUERY[other] for other in others}, k=50)
    except errors.Conflict as error:
        yield error.code
        return
    with world.store.catalog.reading() as session:
        payloads = item_rows.payloads(session, [hit.place for hit in answer.hits(0)])
    yield answer.score_space
    for hit in answer.hits(0):
        yield hit.id, hit.score, hit.origin, payloads[hit.place]


def _right_in_every_hit(world: World) -> None:
    """At any progress, against the vectors that were written."""
    try:
        answer = world.search("new", QUERY["new"], companions={"old": QUERY["old"]}, k=50)
    except errors.NoRoute:
        return  # items without side-information, and no upgrade that lets zeros stand for it
    written = dict(zip(IDS, zip(VECTORS, SIDES, strict=True), strict=True))
    none = np.zeros(2, np.float32)
    replaced = {
        "i1": (OTHERS[0], SIDES[0]),
        "i2": (OTHERS[1], none),
        "i5": (OTHERS[2], SIDES[1]),
        "new": (OTHERS[3], none),
    }
    for item, score in found(answer).items():
        for vector, side in (table[item] for table in (replaced, written) if item in table):
            mapped = vector if answer.score_space == "old" else WITH_SIDE(vector[None], side[None])[0]
            if score == distance(QUERY[answer.score_space][0], mapped):
                break
        else:
            pytest.fail(f"{item} has the score {score}, which neither its old nor its new vector has")


def _verified(world: World) -> None:
    """Every file that a row names is there, whole."""
    with world.store.catalog.reading() as session:
        for column in session.scalars(select(ColumnRow)):
            verify(world.store.files, column.file, column.sha256)
            if column.index_file is not None:
                verify(world.store.files, column.index_file, column.index_sha256 or "")
        for segment in session.scalars(select(SegmentRow)):
            verify(world.store.files, segment.ids_file, segment.ids_sha256)
            if segment.side_file is not None:
                verify(world.store.files, segment.side_file, segment.side_sha256 or "")
