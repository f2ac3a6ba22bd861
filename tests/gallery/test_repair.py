"""What was damaged on disk is made anew from what was not, named where it cannot be, and searched right meanwhile."""

from __future__ import annotations

import shutil
import struct
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from sqlalchemy import select

from gallery import errors, repair, snapshot, verify, views
from gallery.arrays import Stored
from gallery.catalog.tables import ColumnRow, EventRow, SegmentRow
from gallery.files import Files, digest
from gallery.index.base import Index
from gallery.indexing import index_column
from gallery.snapshot import Galleries
from gallery.transforms import Transforms, artifact_file
from gallery.upgrade import lifecycle
from gallery.upgrade.states import State
from tests.gallery import chain
from tests.gallery.crash import Bomb, Killed, Stage, named_files, stored_files, sweep
from tests.gallery.world import GALLERY, PLAIN, WITH_SIDE, World, distance, found, load

RNG = np.random.default_rng(3)
IDS = [f"i{row}" for row in range(30)]
VECTORS = RNG.integers(-9, 10, (30, 4)).astype(np.float32)
SIDE = RNG.integers(-9, 10, (30, 2)).astype(np.float32)
QUERY = {"old": np.array([3, -1, 4, 1], np.float32), "new": np.array([2, 7, -1, 8, 2], np.float32)}
#: the larger of two segments has index files, in which every row is read
SETTINGS = {"exact_below": 8}
INDEX = {"kind": "ivf", "nlist": 1, "nprobe": 1}
DELETED = ("i3", "i27")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An upgraded gallery of two segments."""
    folder = tmp_path_factory.mktemp("upgraded") / "data"
    world = World.open(folder, **SETTINGS).prepare(("forward", "old", "new", WITH_SIDE), index=INDEX)
    fill(world)
    world.close()
    return folder


def fill(world: World) -> None:
    for rows in (slice(0, 24), slice(24, 30)):
        world.upsert("old", IDS[rows], VECTORS[rows], side=SIDE[rows])
    assert world.run(world.start()) is State.COMPLETED
    world.delete(*DELETED)


@pytest.fixture
def world(tmp_path: Path, template: Path) -> Iterator[World]:
    shutil.copytree(template, tmp_path / "data")
    opened = World.open(tmp_path / "data", **SETTINGS)
    yield opened
    opened.close()


def test_to_verify_a_large_segment_takes_few_bytes_of_memory_for_each_of_its_items(tmp_path: Path) -> None:
    world, items = World.open(tmp_path / "data").prepare(index={"kind": "flat"}), 60_000
    world.upsert("old", [f"item-{row}" for row in range(items)], np.ones((items, 4), np.float32))
    verify.gallery(world.store.catalog, world.store.files, GALLERY)
    tracemalloc.start()
    try:
        assert verify.gallery(world.store.catalog, world.store.files, GALLERY).items == items
        assert tracemalloc.get_traced_memory()[1] < 160 * items
    finally:
        tracemalloc.stop()
        world.close()


def column(world: World, segment: int, origin: str = "derived") -> ColumnRow:
    with world.store.catalog.reading() as session:
        where = (ColumnRow.segment_id == segment, ColumnRow.origin == origin)
        return session.scalars(select(ColumnRow).where(*where)).one()


def segment_row(world: World, segment: int) -> SegmentRow:
    with world.store.catalog.reading() as session:
        return session.get_one(SegmentRow, segment)


def events(world: World, action: str) -> list[EventRow]:
    with world.store.catalog.reading() as session:
        return list(session.scalars(select(EventRow).where(EventRow.action == action).order_by(EventRow.id)))


def flip(world: World, name: str | None) -> bytes:
    """Change one bit of a file; what it was before."""
    path = world.store.files.path(name or "")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    return whole


def problems(world: World) -> list[str]:
    report = verify.gallery(world.store.catalog, world.store.files, GALLERY)
    return [f"{problem.file}: {problem.what}" for problem in report.problems]


def mended(world: World) -> list[str | None]:
    """The files that were made anew, None for a count; everything is whole afterwards, and nothing lies about."""
    outcome = repair.gallery(world.store, GALLERY, actor="operator")
    assert outcome.report.problems == []
    assert problems(world) == []
    assert stored_files(world.store.files.root) == named_files(world)
    return [each.file for each in outcome.mended]


def expected(model: str) -> dict[str, float]:
    vectors = VECTORS if model == "old" else WITH_SIDE(VECTORS, SIDE)
    live = [row for row, item in enumerate(IDS) if item not in DELETED]
    return {IDS[row]: distance(QUERY[model], vectors[row]) for row in live}


def right(world: World, *, companions: bool = True) -> dict[str, int]:
    """Every live item, with the right score, by either model's query; how many came by which route to the new one's."""
    assert found(world.search("old", [QUERY["old"]])) == expected("old")
    answer = world.search("new", [QUERY["new"]], companions={"old": [QUERY["old"]]} if companions else None)
    assert found(answer) == expected("new")
    return {"direct": answer.coverage.direct, "forward": answer.coverage.forward}


def another(world: World) -> World:
    """A process that starts now."""
    return World.open(world.store.files.root, world.store.settings.database_url, **SETTINGS)


@pytest.mark.parametrize("what", ["first seen", "seen before"])
def test_a_gallery_that_cannot_be_put_together_is_said_to_be_damaged_and_not_found_empty(
    world: World, what: str
) -> None:
    able = what == "seen before"

    def place(index: Index, _: Sequence[Stored]) -> Index:
        if not able:
            raise RuntimeError("out of memory")
        return index

    galleries = Galleries(world.store.catalog, world.store.files, place)
    if able:
        galleries.refresh()
        world.upsert("old", ["late"], VECTORS[:1], side=SIDE[:1])
        able = False
    with pytest.raises(errors.Damaged, match="out of memory"):
        galleries.refresh().snapshot(GALLERY)


def test_an_index_whose_bytes_ask_for_all_memory_is_left_out(world: World) -> None:
    name = column(world, 1).index_file or ""
    path = world.store.files.path(name)
    whole, numbers = path.read_bytes(), struct.pack("<Q", 5)  # before the five numbers of the one list's centroid
    assert numbers in whole
    path.write_bytes(whole.replace(numbers, struct.pack("<Q", 1 << 36)))
    with pytest.raises(MemoryError):
        faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    started = another(world)
    assert right(started) == {"direct": 28, "forward": 0}
    assert mended(world) == [name]
    started.close()


@pytest.mark.parametrize("what", ["the index", "the derived column"])
def test_what_could_not_be_opened_for_a_moment_is_opened_again_without_another_write(
    world: World, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_LOOK_AGAIN_SECONDS", 0.0)
    module, opens = (faiss, "read_index") if what == "the index" else (views, "open_column")
    refused = column(world, 1).index_file if what == "the index" else column(world, 1).file
    with monkeypatch.context() as moment:
        moment.setattr(module, opens, refusing(getattr(module, opens), refused))
        fresh = another(world)
        left = right(fresh)
    assert left == ({"direct": 28, "forward": 0} if what == "the index" else {"direct": 5, "forward": 23})
    assert right(fresh) == {"direct": 28, "forward": 0}
    assert fresh.galleries.current.snapshot(GALLERY).segments[0].columns["new"].index.kind == "ivf"
    fresh.close()


def refusing(opens: Any, refused: str | None) -> Any:
    """Opens all files but one, as where there are no file descriptors left."""

    def opened(path: Any, *given: Any, **named: Any) -> Any:
        if str(path).endswith(str(refused)):
            raise OSError(24, "Too many open files")
        return opens(path, *given, **named)

    return opened


# --- vectors ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def angles(tmp_path: Path) -> Iterator[World]:
    """A gallery whose new model compares directions."""
    opened = World.open(tmp_path / "data").prepare()
    opened.register("angle", 5, "cosine")
    opened.transformation("angled", "old", "angle", PLAIN)
    yield opened
    opened.close()


def test_zeros_that_a_transformation_gave_are_no_problem(angles: World) -> None:
    angles.upsert("old", ["zero", "one"], [[0, 0, 0, 0], [1, 0, 0, 0]])
    assert angles.run(angles.start("angled")) is State.COMPLETED
    hits = angles.search("angle", [PLAIN([[1, 0, 0, 0]])[0]]).hits(0)
    assert [(hit.id, hit.score) for hit in hits] == [("one", 1), ("zero", 0)]
    assert problems(angles) == []


def test_zeros_that_a_model_is_said_to_have_given_are_a_problem_where_they_have_no_direction(angles: World) -> None:
    for model, said in (("old", []), ("angle", ["the vector of row 0 cannot be compared with any"])):
        angles.make(model, model=model)
        angles.upsert(model, ["zero"], np.ones((1, 4 if model == "old" else 5)), gallery=model)
        with angles.store.catalog.transaction() as tx:
            (native,) = tx.session.scalars(select(ColumnRow).order_by(ColumnRow.id.desc()).limit(1))
            path = angles.store.files.path(native.file)
            np.save(path, np.zeros_like(np.load(path)))
            native.sha256 = digest(path)
        report = verify.gallery(angles.store.catalog, angles.store.files, model)
        assert [problem.what for problem in report.problems] == said


# --- a derived column -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [1, 2], ids=["with an index", "without"])
def test_a_derived_column_is_made_anew_from_its_source_bit_by_bit(world: World, segment: int) -> None:
    before = column(world, segment)
    whole = flip(world, before.file)
    assert mended(world) == [before.file]
    after = column(world, segment)
    assert (after.id > before.id, after.file != before.file) == (True, True)
    assert world.store.files.path(after.file).read_bytes() == whole
    assert (after.sha256, after.lineage, after.upgrade_id) == (before.sha256, before.lineage, before.upgrade_id)
    assert (after.index_file is None, after.published) == (before.index_file is None, True)
    assert right(world) == {"direct": 28, "forward": 0}


def test_a_process_that_has_the_damaged_file_mapped_goes_on_with_the_new_one(world: World) -> None:
    right(world)
    flip(world, column(world, 2).file)
    with pytest.raises(AssertionError):
        right(world)  # the damage is seen by who has the file mapped
    repair.gallery(world.store, GALLERY)
    right(world)


def test_the_audit_says_who_had_it_made_anew_by_which_artifact_and_whether_it_is_what_it_was(world: World) -> None:
    before = column(world, 2)
    flip(world, before.file)
    mended(world)
    (event,) = events(world, "column.repaired")
    assert (event.actor, event.gallery, event.upgrade_id) == ("operator", GALLERY, before.upgrade_id)
    told = event.detail
    assert (told["segment"], told["model"], told["transformation"]) == (2, "new", "forward")
    assert told["artifact"] == before.lineage[0]["artifact"]
    assert (told["sha256"], told["sha256_before"], told["same"]) == (before.sha256, before.sha256, True)


def test_deleted_rows_that_are_counted_wrong_are_counted_anew(world: World) -> None:
    def dead() -> int:
        return segment_row(world, 1).dead

    right = dead()
    with world.store.catalog.transaction() as tx:
        tx.session.get_one(SegmentRow, 1).dead += 2
    assert mended(world) == [None]
    assert dead() == right
    (event,) = events(world, "count.repaired")
    assert (event.actor, event.detail) == ("operator", {"segment": 1, "dead": right, "dead_before": right + 2})


def test_where_another_machine_rounds_otherwise_the_new_digest_is_recorded_and_it_says_so(world: World) -> None:
    before = column(world, 2)
    flip(world, before.file)

    def rounding(path: Path) -> Any:
        linear = load(path)
        return lambda embeddings, side=None: linear(embeddings, side) * np.float32(1 + 1e-6)

    world.store = type(world.store)(
        world.store.catalog, world.store.files, Transforms(world.store.files, rounding), world.store.settings
    )
    outcome = repair.gallery(world.store, GALLERY)
    assert "not bit by bit" in outcome.mended[0].what
    after = column(world, 2)
    assert after.sha256 != before.sha256
    assert problems(world) == []
    (event,) = events(world, "column.repaired")
    assert (event.detail["sha256"], event.detail["same"]) == (after.sha256, False)


def test_what_was_computed_in_fewer_bits_is_made_anew_in_all_of_them_and_its_lineage_says_so(world: World) -> None:
    with world.store.catalog.transaction() as tx:
        changed = tx.session.get_one(ColumnRow, column(world, 2).id)
        changed.lineage = [{**step, "computed_in": "bfloat16"} for step in changed.lineage]
    flip(world, column(world, 2).file)
    mended(world)
    assert "computed_in" not in column(world, 2).lineage[-1]


def test_a_column_that_cannot_be_opened_is_left_out_of_searches_until_it_is_made_anew(world: World) -> None:
    name = column(world, 1).file
    world.store.files.path(name).write_bytes(b"torn")
    fresh = another(world)
    assert right(fresh) == {"direct": 5, "forward": 23}  # mapped when they are asked for, as before the upgrade
    assert mended(world) == [name]
    assert right(fresh) == {"direct": 28, "forward": 0}
    fresh.close()


def test_what_was_made_from_each_other_is_made_anew_in_that_order(tmp_path: Path) -> None:
    world = chain.prepared(tmp_path / "data", direct=False)
    world.upsert("old", IDS, VECTORS, side=SIDE)
    for name in ("first", "second"):
        assert world.run(world.start(name)) is State.COMPLETED
    digests = chain.digests(world)
    with world.store.catalog.reading() as session:
        derived = {len(row.lineage): row.file for row in session.scalars(select(ColumnRow)) if row.lineage}
    for name in derived.values():
        flip(world, name)
    assert mended(world) == [derived[1], derived[2]]
    assert chain.digests(world) == digests
    world.close()


def test_two_that_make_it_anew_at_once_leave_one(world: World) -> None:
    name = column(world, 2).file
    flip(world, name)
    other = another(world)
    apply = other.store.transforms.apply

    def slowly(*given: Any) -> Any:
        assert repair.file(world.store, name) is not None
        return apply(*given)

    other.store.transforms.apply = slowly  # type: ignore[method-assign]
    assert repair.file(other.store, name) is None
    assert len(events(world, "column.repaired")) == 1
    assert stored_files(world.store.files.root) == named_files(world)
    right(world)
    other.close()


# --- an index, and ids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["native", "derived"])
@pytest.mark.parametrize("how", ["changed", "torn", "gone"])
def test_an_index_is_built_anew_and_its_column_is_searched_exactly_meanwhile(
    world: World, origin: str, how: str
) -> None:
    with world.store.catalog.reading() as session:
        names = {
            row.origin: row.index_file for row in session.scalars(select(ColumnRow).where(ColumnRow.segment_id == 1))
        }
    name = names[origin] if origin == "derived" else index_natively(world)
    assert name is not None
    if how == "changed":
        flip(world, name)
    elif how == "torn":
        world.store.files.path(name).write_bytes(b"torn")
    else:
        world.store.files.remove([name])
    if how != "changed":
        fresh = another(world)
        assert right(fresh) == {"direct": 28, "forward": 0}
        fresh.close()
    assert mended(world) == [name]
    after = column(world, 1, origin)
    assert after.index_file not in (None, name)
    assert right(world) == {"direct": 28, "forward": 0}


def test_an_index_that_a_worker_built_before_the_repair_could_is_told_as_built(world: World) -> None:
    derived = column(world, 1)

    class Beside(Files):
        """A worker sees that the index is gone as soon as it is."""

        def remove(self, names: Iterable[str]) -> None:
            super().remove(names)
            assert index_column(world.store, derived.id)

    world.store.files.path(derived.index_file or "").write_bytes(b"torn")
    done = repair.file(replace(world.store, files=Beside(world.store.files.root)), derived.index_file or "")
    assert done is not None
    assert done.what == "the index was built anew from its column"


def index_natively(world: World) -> str | None:
    """As a worker does it."""
    index_column(world.store, column(world, 1, "native").id)
    return column(world, 1, "native").index_file


def test_ids_are_written_anew_from_the_catalog_and_seen_by_who_had_the_damaged_ones(world: World) -> None:
    right(world)
    name = segment_row(world, 1).ids_file
    whole = flip(world, name)
    assert found(world.search("old", [QUERY["old"]])) != expected("old")
    assert mended(world) == [name]
    after = segment_row(world, 1)
    assert world.store.files.path(after.ids_file).read_bytes() == whole
    right(world)


# --- what cannot be made anew -----------------------------------------------------------------------------------------


def a_native_column(world: World) -> tuple[str, str]:
    return column(world, 1, "native").file, "store its 23 items again"


def side_information(world: World) -> tuple[str, str]:
    return segment_row(world, 1).side_file or "", "store them again"


def the_source_is_damaged_too(world: World) -> tuple[str, str]:
    source = column(world, 1, "native").file
    flip(world, source)
    return column(world, 1).file, f"{source} does not have its recorded SHA-256"


def the_source_was_let_go(world: World) -> tuple[str, str]:
    lifecycle.finalize(world.store, column(world, 1).upgrade_id or "")
    return column(world, 1).file, "let go of by a finalize: store its 23 items again"


def the_artifact_is_damaged(world: World) -> tuple[str, str]:
    flip(world, artifact_file(column(world, 1).lineage[0]["artifact"]))
    world.store.transforms._loaded.clear()
    return column(world, 1).file, "artifacts/"


@pytest.mark.parametrize(
    "damage",
    [a_native_column, side_information, the_source_is_damaged_too, the_source_was_let_go, the_artifact_is_damaged],
    ids=lambda each: each.__name__,
)
def test_what_cannot_be_made_anew_is_named_with_what_helps_and_stays_as_it_is(world: World, damage: Any) -> None:
    name, helps = damage(world)
    flip(world, name)
    there = stored_files(world.store.files.root)
    outcome = repair.gallery(world.store, GALLERY)
    (told,) = [problem for problem in outcome.report.problems if problem.file == name]
    assert "SHA-256; " in told.what
    assert helps in told.what
    assert outcome.mended == []
    assert stored_files(world.store.files.root) == there
    with pytest.raises(errors.Damaged):
        repair.file(world.store, name)
    assert not repair.attempt(world.store, errors.Damaged("", file=name))


def test_what_no_row_names_any_more_is_not_damaged(world: World) -> None:
    name = column(world, 1).file
    lifecycle.rollback(world.store, column(world, 1).upgrade_id or "")
    assert repair.file(world.store, name) is None
    assert not repair.attempt(world.store, OSError("no space left"))


# --- an upgrade mends itself ------------------------------------------------------------------------------------------


def test_an_upgrade_makes_a_damaged_column_anew_before_it_completes(each_world: World) -> None:
    each_world.upsert("old", IDS, VECTORS, side=SIDE)
    upgrade = each_world.start(cutover="automatic")
    while each_world.state(upgrade) is not State.VERIFYING:
        assert each_world.step(upgrade)
    name = column(each_world, 1).file
    flip(each_world, name)
    assert each_world.run(upgrade) is State.COMPLETED, each_world.error(upgrade)
    assert problems(each_world) == []
    (event,) = events(each_world, "column.repaired")
    assert (event.upgrade_id, event.detail["file"]) == (upgrade, name)
    right_of_all(each_world)


def test_where_the_source_is_damaged_too_the_upgrade_fails_until_that_is_whole_again(world: World) -> None:
    world.upsert("old", ["late"], VECTORS[:1], side=SIDE[:1])
    lifecycle.rollback(world.store, column(world, 1).upgrade_id or "")
    upgrade = world.start()
    while world.state(upgrade) is not State.VERIFYING:
        assert world.step(upgrade)
    native = column(world, 1, "native").file
    whole = flip(world, native)
    damaged = column(world, 1).file
    flip(world, damaged)
    assert world.run(upgrade) is State.FAILED
    assert damaged in (world.error(upgrade) or "")
    world.store.files.path(native).write_bytes(whole)
    lifecycle.retry(world.store, upgrade)
    assert world.run(upgrade) is State.COMPLETED
    assert problems(world) == []


def test_an_upgrade_whose_derived_source_is_damaged_has_it_made_anew(tmp_path: Path) -> None:
    world = chain.prepared(tmp_path / "data", direct=False)
    world.upsert("old", IDS, VECTORS, side=SIDE)
    assert world.run(world.start("first")) is State.COMPLETED
    flip(world, column(world, 1).file)
    upgrade = world.start("second")
    assert world.run(upgrade) is State.COMPLETED, world.error(upgrade)
    assert problems(world) == []
    assert len(events(world, "column.repaired")) == 1
    world.close()


def right_of_all(world: World) -> None:
    answer = world.search("new", [QUERY["new"]], companions={"old": [QUERY["old"]]})
    assert found(answer) == {
        item: distance(QUERY["new"], vector) for item, vector in zip(IDS, WITH_SIDE(VECTORS, SIDE), strict=True)
    }
    assert answer.coverage.direct == 30


# --- every moment at which it may die -----------------------------------------------------------------------------------


@pytest.mark.parametrize("unwinds", [False, True], ids=["killed", "interrupted"])
def test_who_dies_at_any_moment_of_a_repair_leaves_it_to_be_done_again(
    tmp_path: Path, template: Path, unwinds: bool
) -> None:
    shutil.copytree(template, tmp_path / "before")
    before = World.open(tmp_path / "before", **SETTINGS)
    for name in (segment_row(before, 2).ids_file, column(before, 1).file, column(before, 2).file):
        flip(before, name)
    before.close()
    stage = Stage(tmp_path)
    for at in range(200):
        stage.set(tmp_path / "before")
        bomb = Bomb(at, unwinds=unwinds)
        with suppress(Killed):
            repair.gallery(stage.mortal(bomb, **SETTINGS).store, GALLERY)
        survivor = stage.open(**SETTINGS)
        assert repair.gallery(survivor.store, GALLERY).report.problems == [], bomb.passed
        assert problems(survivor) == [], bomb.passed
        right(survivor)
        sweep(survivor)
        assert stored_files(stage.folder) == named_files(survivor)
        if not bomb.went_off:
            assert at > 20, "no moment to die at was found"
            stage.close()
            return
    pytest.fail("the repair never ends")
