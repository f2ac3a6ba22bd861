"""Small segments become one, and nobody who searches, writes or upgrades can tell."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event, insert, select, update

from gallery import errors, removal
from gallery.catalog import items as item_rows
from gallery.catalog.holdings import holdings
from gallery.catalog.tables import ColumnRow, SegmentRow, now
from gallery.catalog.upgrades import upgrade_row
from gallery.compact import merge
from gallery.compact.plan import AT_ONCE, Rule
from gallery.files import Files
from gallery.indexing import index_column, wanting
from gallery.upgrade import lifecycle
from gallery.upgrade.progress import Progress, progress
from gallery.upgrade.states import State
from tests.gallery.crash import named_files, stored_files, sweep
from tests.gallery.steps import steps_of
from tests.gallery.test_invariants import BOTH, NEW, OLD, fill, in_new, in_old, numbers
from tests.gallery.world import GALLERY, WITH_SIDE, World, found

EVERYTHING = Rule(2, 1000, everything=True)
MAPS = Path("/proc/self/maps")


def segments(world: World) -> list[int]:
    return [view.rows for view in world.galleries.refresh().snapshot(GALLERY).segments]


def answers(world: World, seen: Any = None) -> list[Any]:
    """What is found in either model, by id with score, origin and payload."""
    told = []
    for model, query, more in (("old", OLD, {}), ("new", NEW, BOTH)):
        answer = world.search(model, query, seen=seen, **more)
        with world.store.catalog.reading() as session:
            payloads = item_rows.payloads(session, [hit.place for hit in answer.hits(0)])
        told.append({hit.id: (hit.score, hit.origin, payloads[hit.place]) for hit in answer.hits(0)})
    return told


def mapped(folder: Path) -> set[str]:
    """What this process has mapped of a data folder besides the catalog, removed files among it."""
    paths = {line.split(maxsplit=5)[5] for line in MAPS.read_text().splitlines() if f"{folder}/" in line}
    return {path.removeprefix(f"{folder}/") for path in paths if "/columns/" in path or "/indexes/" in path}


def index_everything(world: World) -> None:
    while columns := wanting(world.store, limit=1):
        assert index_column(world.store, columns[0])


class Meanwhile(Files):
    """Files of a process in which something happens right before the first file is written."""

    def __init__(self, happens: Callable[[], Any], root: Path) -> None:
        super().__init__(root)
        self.happens: Callable[[], Any] | None = happens

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Let it happen, once."""
        if self.happens is not None:
            happens, self.happens = self.happens, None
            happens()
        with super().writing(name) as path:
            yield path


def merged_while(world: World, happens: Callable[[], Any]) -> bool:
    """Whether a merge of everything was published although something happened between its read and its end."""
    url = world.store.settings.database_url
    other = World.open(world.store.files.root, url, files=partial(Meanwhile, happens))
    (look,) = merge.looked(other.store)
    (planned,) = merge.planned(other.store, look, EVERYTHING).merges
    done = merge.merge(other.store, look.gallery_id, planned)
    assert isinstance(other.store.files, Meanwhile)
    assert other.store.files.happens is None, "nothing happened"
    other.close()
    return done


def test_searches_find_the_same_in_every_model_before_and_after(each_world: World) -> None:
    written = fill(each_world)
    upgrade = each_world.start()
    assert each_world.run(upgrade) is State.COMPLETED
    each_world.delete("i0-1", "i2-3")
    for item in ("i0-1", "i2-3"):
        del written[item]
    before = answers(each_world)
    assert segments(each_world) == [4, 4, 4]
    assert each_world.compact() == [(1, 2, 3)]
    assert segments(each_world) == [10]
    assert answers(each_world) == before
    assert found(each_world.search("new", NEW)) == in_new(written)
    assert found(each_world.search("old", OLD)) == in_old(written)
    assert found(each_world.search("old", OLD, filter={"id": "i1-2"})) == {"i1-2": in_old(written)["i1-2"]}
    assert each_world.compact() == []


def test_a_search_that_began_before_ends_as_it_began(world: World) -> None:
    fill(world)
    seen, before = world.galleries.refresh(), answers(world)
    filtered = found(world.search("old", OLD, seen=seen, filter={"id": "i1-2"}))
    world.compact()
    assert answers(world, seen) == before
    assert found(world.search("old", OLD, seen=seen, filter={"id": "i1-2"})) == filtered
    assert merge.reclaim(world.store, 3600) == 0
    assert not merge.reclaimable(world.store, 3600)
    assert merge.reclaim(world.store, -1) == 3
    assert found(world.search("old", OLD, seen=seen)).keys() == before[0].keys()  # the mapped bytes are still its own
    assert answers(world) == before
    assert stored_files(world.store.files.root) == named_files(world)


@pytest.mark.skipif(not MAPS.exists(), reason="what is mapped is looked up in /proc")
def test_what_no_search_sees_any_more_is_not_mapped_any_more(tmp_path: Path) -> None:
    world = World.open(tmp_path / "data", exact_below=1).prepare(
        ("forward", "old", "new", WITH_SIDE), index={"kind": "hnsw"}
    )
    for _ in range(3):
        fill(world)
        index_everything(world)
        upgrade = world.start()
        assert world.run(upgrade) is State.COMPLETED
        answers(world)
        lifecycle.rollback(world.store, upgrade)
        world.compact()
        index_everything(world)
        answers(world)
        assert merge.reclaim(world.store, -1)
    world.galleries.refresh()
    assert mapped(world.store.files.root) == named_files(world)
    world.close()


def test_another_process_sees_the_merged_segment_and_finds_the_same(world: World) -> None:
    fill(world)
    other = World.open(world.store.files.root, world.store.settings.database_url)
    before = answers(other)
    world.compact()
    world.delete("i0-0")
    merge.reclaim(world.store, -1)
    for told in before:
        del told["i0-0"]
    assert answers(other) == before
    assert segments(other) == [12]
    other.close()


def test_what_is_deleted_or_replaced_meanwhile_is_not_brought_back(each_world: World) -> None:
    written = fill(each_world)

    def happens() -> None:
        each_world.delete("i0-0", "i2-1")
        each_world.upsert("old", ["i1-1"], numbers(77, 1, 4), side=numbers(78, 1, 2))

    assert merged_while(each_world, happens)
    del written["i0-0"], written["i2-1"]
    written["i1-1"] = numbers(77, 1, 4)[0], numbers(78, 1, 2)[0]
    assert found(each_world.search("old", OLD)) == in_old(written)
    assert found(each_world.search("new", NEW, **BOTH)) == in_new(written)
    assert sorted(segments(each_world)) == [1, 12]
    assert len(each_world.compact()) == 1
    assert segments(each_world) == [10]
    assert found(each_world.search("old", OLD)) == in_old(written)


def test_an_upgrade_that_starts_meanwhile_goes_first(world: World) -> None:
    written = fill(world)
    started: list[str] = []
    assert not merged_while(world, lambda: started.append(world.start()))
    assert segments(world) == [4, 4, 4]
    assert stored_files(world.store.files.root) == named_files(world)
    assert world.compact() == [], "an active upgrade's segments are left alone"
    assert world.run(started[0]) is State.COMPLETED
    assert found(world.search("new", NEW)) == in_new(written)


def test_what_an_active_upgrade_has_no_work_for_is_merged_under_it(world: World) -> None:
    written = fill(world)
    upgrade = world.start()
    world.step(upgrade)
    native = numbers(9, 2, 5)
    for at in range(2):
        world.upsert("new", [f"n{at}"], native[at : at + 1])
    assert world.compact() == [(4, 5)]
    assert world.run(upgrade) is State.COMPLETED
    scores = found(world.search("new", NEW))
    assert scores.keys() == {*written, "n0", "n1"}
    assert {item: scores[item] for item in written} == in_new(written)


def test_two_workers_that_merge_the_same_make_one_segment(each_world: World) -> None:
    written = fill(each_world)
    assert not merged_while(each_world, each_world.compact)
    assert segments(each_world) == [12]
    assert found(each_world.search("old", OLD)) == in_old(written)
    assert stored_files(each_world.store.files.root) == named_files(each_world)


def test_a_gallery_that_is_deleted_meanwhile_stays_deleted(world: World) -> None:
    fill(world)
    assert not merged_while(world, lambda: removal.delete_gallery(world.store, GALLERY))
    sweep(world)
    assert stored_files(world.store.files.root) == set()


@pytest.mark.parametrize("reclaimed", [False, True])
def test_a_rollback_after_a_merge_goes_back_to_the_vectors_of_before(world: World, reclaimed: bool) -> None:
    written = fill(world)
    before = world.search("old", OLD)
    upgrade = world.start()
    world.run(upgrade)
    world.compact()
    if reclaimed:
        merge.reclaim(world.store, -1)
    lifecycle.rollback(world.store, upgrade)
    after = world.search("old", OLD)
    assert found(after) == found(before) == in_old(written)
    assert after.scores.tobytes() == before.scores.tobytes()
    merge.reclaim(world.store, -1)
    (view,) = world.galleries.refresh().snapshot(GALLERY).segments
    assert view.columns.keys() == {"old"}
    assert stored_files(world.store.files.root) == named_files(world)
    again = world.start()
    assert world.run(again) is State.COMPLETED
    assert found(world.search("new", NEW)) == in_new(written)


def test_finalize_after_a_merge_frees_the_old_columns(world: World) -> None:
    written = fill(world)
    upgrade = world.start()
    world.run(upgrade)
    world.compact()
    lifecycle.finalize(world.store, upgrade)
    merge.reclaim(world.store, -1)
    assert found(world.search("new", NEW)) == in_new(written)
    assert world.compact() == []
    assert stored_files(world.store.files.root) == named_files(world)


def test_native_and_derived_vectors_are_never_in_one_column(world: World) -> None:
    fill(world, requests=2)
    upgrade = world.start()
    world.run(upgrade)
    for at in range(2):
        world.upsert("new", [f"n{at}"], numbers(at, 1, 5))
    assert world.compact() == [(1, 2), (3, 4)]
    lifecycle.finalize(world.store, upgrade)
    assert world.compact() == [], "alike in what they hold, but not in where it came from"
    with world.store.catalog.reading() as session:
        there = select(ColumnRow).join(SegmentRow).where(SegmentRow.retired_at.is_(None)).order_by(ColumnRow.id)
        columns = list(session.scalars(there))
        (counted,) = holdings(session, [1])[1].models.values()
    assert [(c.origin, c.transformation_id is not None, c.upgrade_id) for c in columns] == [
        ("derived", True, upgrade),
        ("native", False, None),
    ]
    assert (counted.native_items, counted.derived_items) == (2, 8)


def test_segments_with_and_without_side_information_stay_apart(world: World) -> None:
    fill(world, requests=2)
    for at in range(2):
        world.upsert("old", [f"bare{at}"], numbers(at, 1, 4))
    assert world.compact() == [(1, 2), (3, 4)]


def test_segments_that_have_become_unlike_since_the_merge_was_planned_are_left_as_they_are(world: World) -> None:
    fill(world, requests=1)
    world.upsert("old", ["bare"], numbers(1, 1, 4))
    before = world.search("old", OLD)
    (look,) = merge.looked(world.store)
    assert not merge.merge(world.store, look.gallery_id, [1, 2])
    assert segments(world) == [4, 1]
    assert found(world.search("old", OLD)) == found(before)


def test_progress_of_an_upgrade_that_is_over_stays_as_it_was_whatever_becomes_of_its_items(each_world: World) -> None:
    def told() -> Progress:
        with world.store.catalog.reading() as session:
            return progress(session, upgrade_row(session, upgrade))

    def compact() -> None:
        world.compact()
        merge.reclaim(world.store, -1)

    world = each_world
    ids = list(fill(world))
    upgrade = world.start()
    world.run(upgrade)
    at_the_end = told()
    assert (at_the_end.items_total, at_the_end.items_done, at_the_end.segments_done) == (12, 12, 3)
    assert at_the_end.items_per_second is not None
    compact()
    assert told() == at_the_end
    world.delete(*ids[:5])
    compact()
    assert told() == at_the_end
    lifecycle.rollback(world.store, upgrade)
    assert told() == at_the_end
    world.delete(*ids[5:])
    compact()
    assert told() == at_the_end
    removal.delete_gallery(world.store, GALLERY)
    assert told() == at_the_end


def test_an_upgrade_that_is_cancelled_with_its_gallery_keeps_what_it_did(world: World) -> None:
    fill(world)
    upgrade = world.start()
    while world.state(upgrade) is not State.RUNNING:
        world.step(upgrade)
    world.step(upgrade)
    removal.delete_gallery(world.store, GALLERY)
    with world.store.catalog.reading() as session:
        told = progress(session, upgrade_row(session, upgrade))
    assert (told.items_total, told.items_done, told.segments_total, told.segments_done) == (12, 4, 3, 1)


def test_hits_of_the_old_segments_are_those_of_the_new_one(world: World) -> None:
    fill(world)
    with world.store.catalog.transaction() as tx:
        tx.session.execute(update(SegmentRow).values(hits=SegmentRow.id * 10))
    world.compact()
    with world.store.catalog.reading() as session:
        assert session.scalars(select(SegmentRow.hits).where(SegmentRow.retired_at.is_(None))).all() == [60]


def test_a_large_merged_segment_comes_with_its_index(tmp_path: Path) -> None:
    world = World.open(tmp_path / "data", exact_below=4).prepare(index={"kind": "hnsw"})
    written = fill(world)
    for column in wanting(world.store):
        assert index_column(world.store, column)
    world.compact()
    (view,) = world.galleries.refresh().snapshot(GALLERY).segments
    assert view.columns["old"].index.kind == "hnsw"
    assert found(world.search("old", OLD)) == in_old(written)
    with world.store.catalog.reading() as session:
        told = holdings(session, [1])[1].models["old"].measured
    assert [index["segment"] for index in told] == [view.id], "those that were merged are not told any more"
    world.close()


def test_half_precision_stays_as_it_is_stored(tmp_path: Path) -> None:
    world = World.open(tmp_path / "data").prepare(storage_dtype="float16")
    vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    for at in range(3):
        world.upsert("old", [f"{at}-{n}" for n in range(2)], vectors[2 * at : 2 * at + 2])
    world.compact()
    (view,) = world.galleries.refresh().snapshot(GALLERY).segments
    stored = view.columns["old"].vectors
    assert stored.dtype == np.float16
    assert stored.tobytes() == vectors.astype(np.float16).tobytes()
    world.close()


def test_segments_of_which_everything_is_deleted_go_without_a_new_one(world: World) -> None:
    written = fill(world)
    world.delete(*[item for item in written if item.startswith("i1")])
    assert world.compact(segments=9, everything=False) == [(2,)]
    with world.store.catalog.reading() as session:
        assert holdings(session, [1])[1].segments == 2
    merge.reclaim(world.store, -1)
    world.delete(*[item for item in written if not item.startswith("i1")])
    world.compact()
    merge.reclaim(world.store, -1)
    assert found(world.search("old", OLD)) == {}
    assert stored_files(world.store.files.root) == set()


def test_bytes_that_changed_on_the_disk_get_no_new_digest(world: World) -> None:
    fill(world)
    with world.store.catalog.reading() as session:
        file = session.scalars(select(ColumnRow.file).where(ColumnRow.segment_id == 2)).one()
    path = world.store.files.path(file)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(errors.Damaged, match="SHA-256"):
        merge.merge(world.store, 1, [1, 2, 3])
    assert segments(world) == [4, 4, 4]
    assert stored_files(world.store.files.root) == named_files(world)


def test_no_statement_names_all_of_the_segments_that_are_reclaimed(world: World) -> None:
    """SQLite takes 32,766 values in one, PostgreSQL 65,535, and a worker that was away for long may find more."""
    file = {"ids_file": "columns/1/none.npy", "ids_sha256": "", "ids_bytes": 0}
    retired = {"gallery_id": 1, "rows": 1, "version": 1, "retired_at": now() - timedelta(hours=1), **file}
    with world.store.catalog.transaction() as tx:
        tx.session.execute(insert(SegmentRow), [retired] * (2 * AT_ONCE + 1))
    most = 0

    def listen(_c: object, _cursor: object, _statement: str, values: Any, *_: object) -> None:
        nonlocal most
        most = max(most, len(values))

    event.listen(world.store.catalog.engine, "before_cursor_execute", listen)
    assert merge.reclaim(world.store, 60) == 2 * AT_ONCE + 1
    assert not merge.reclaimable(world.store, 60)
    assert most <= AT_ONCE


def test_a_merge_takes_as_many_statements_however_many_segments_it_takes(each_world: World) -> None:
    statements: list[str] = []
    event.listen(each_world.store.catalog.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))

    def merged(requests: int) -> int:
        fill(each_world, requests=requests)
        (look,) = merge.looked(each_world.store)
        small = max(merge.planned(each_world.store, look, EVERYTHING).merges, key=len)
        assert len(small) == requests
        statements.clear()
        assert merge.merge(each_world.store, look.gallery_id, small)
        return len(statements)

    assert merged(3) == merged(12)


def test_a_look_for_merges_reads_no_items(world: World) -> None:
    world.upsert("old", [f"i{row}" for row in range(2000)], np.ones((2000, 4)))
    (look,), rule = merge.looked(world.store), Rule(2, 100_000)

    def looked() -> tuple[merge.Planned, int]:
        return steps_of(world.store.catalog, lambda: merge.planned(world.store, look, rule))

    nothing, before = looked()
    world.delete(*(f"i{row}" for row in range(900)))
    assert looked() == (nothing, before)
    world.delete(*(f"i{row}" for row in range(900, 1024)))
    assert looked()[0].merges == [(1,)]


def test_of_all_the_rows_that_a_merge_moves_who_looks_for_deletions_is_told_nothing(each_world: World) -> None:
    fill(each_world)
    each_world.delete("i1-1")
    snapshot = each_world.galleries.refresh().snapshot(GALLERY)
    assert each_world.compact() == [(1, 2, 3)]
    each_world.delete("i2-0", "i0-1")
    with each_world.store.catalog.reading() as session:
        deleted = item_rows.deleted_since(session, snapshot.gallery_id, snapshot.version)
    assert {segment: sorted(rows.tolist()) for segment, rows in deleted.items()} == {4: [1, 7]}


def test_what_was_asked_for_is_remembered_until_it_is_done(world: World) -> None:
    fill(world, requests=2)
    never = Rule(0, 1000)
    (look,) = merge.looked(world.store)
    assert merge.planned(world.store, look, never).merges == []
    merge.ask(world.store, GALLERY, actor="ada")
    (look,) = merge.looked(world.store)
    (planned,) = merge.planned(world.store, look, never).merges
    assert merge.merge(world.store, look.gallery_id, planned)
    merge.answered(world.store, look)
    (look,) = merge.looked(world.store)
    assert look.asked_at is None
    with pytest.raises(errors.GalleryNotFound):
        merge.ask(world.store, "nowhere")


def write_and_delete(world: World, which: int) -> dict[str, tuple[Any, Any]]:
    """What one writer left of its own ids."""
    random, written = np.random.default_rng(which), dict[str, tuple[Any, Any]]()
    for turn in range(20):
        ids = [f"w{which}-{n}" for n in sorted(random.choice(12, 3, replace=False))]
        vectors, side = numbers(1000 * which + turn, 3, 4), numbers(turn, 3, 2)
        world.upsert("old", ids, vectors, side=side, payloads=[{}] * 3)
        written.update(zip(ids, zip(vectors, side, strict=True), strict=True))
        gone = f"w{which}-{random.integers(12)}"
        world.delete(gone)
        written.pop(gone, None)
    return written


def test_writers_searches_an_upgrade_and_merges_at_once_lose_nothing(each_world: World) -> None:
    """No search finds an id twice, or fails; in the end all is there that each writer left of its ids."""
    done, made = threading.Event(), list[bool]()

    def compact() -> None:
        while not done.is_set():
            for look in merge.looked(each_world.store):
                planned = merge.planned(each_world.store, look, EVERYTHING).merges
                made.extend(merge.merge(each_world.store, look.gallery_id, each) for each in planned)
            merge.reclaim(each_world.store, 5)

    def search() -> None:
        while not done.is_set():
            found(each_world.search("old", OLD))
            found(each_world.search("new", NEW, **BOTH))

    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(compact), pool.submit(search)]
        try:
            first, second = pool.map(partial(write_and_delete, each_world), range(2))
            upgrade = each_world.start()
            while each_world.state(upgrade) is not State.COMPLETED:
                each_world.step(upgrade)
        finally:
            done.set()
        for other in others:
            other.result()
    assert any(made)
    assert found(each_world.search("old", OLD)) == in_old(first | second)
    assert found(each_world.search("new", NEW)) == in_new(first | second)
