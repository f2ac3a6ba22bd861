"""What a process reads of the catalog, and opens, to see what changed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from sqlalchemy import event

from gallery.catalog.tables import Base, ColumnRow, SegmentRow
from tests.gallery.world import GALLERY, World


@contextmanager
def rows_read() -> Iterator[Counter[type[Base]]]:
    """How many rows are read whole, by table."""
    counted: Counter[type[Base]] = Counter()

    def count(row: Any, _: Any) -> None:
        counted[type(row)] += 1

    for table in (ColumnRow, SegmentRow):
        event.listen(table, "load", count)
    try:
        yield counted
    finally:
        for table in (ColumnRow, SegmentRow):
            event.remove(table, "load", count)


def test_of_many_segments_a_write_reads_only_what_is_new(each_world: World) -> None:
    for at in range(20):
        each_world.upsert("old", [f"i{at}"], np.full((1, 4), at))
    before = each_world.galleries.refresh().snapshot(GALLERY)
    each_world.upsert("old", ["new"], np.ones((1, 4)))
    with rows_read() as read:
        after = each_world.galleries.refresh().snapshot(GALLERY)
    assert read == {SegmentRow: 1, ColumnRow: 1}
    assert all(now is then for now, then in zip(after.segments[:-1], before.segments, strict=True))
    each_world.delete("i3")
    with rows_read() as read:
        last = each_world.galleries.refresh().snapshot(GALLERY)
    assert not read
    assert [
        at for at, (now, then) in enumerate(zip(last.segments, after.segments, strict=True)) if now is not then
    ] == [3]


def test_a_write_is_seen_by_eight_statements_and_a_deletion_by_six(each_world: World) -> None:
    statements: list[str] = []
    event.listen(each_world.store.catalog.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))

    def asked() -> int:
        statements.clear()
        each_world.galleries.refresh()
        return sum(statement.startswith("SELECT") for statement in statements)

    each_world.galleries.refresh()
    each_world.upsert("old", ["a", "b"], np.ones((2, 4)))
    assert asked() == 8
    each_world.delete("a")
    assert asked() == 6, "nothing is new of segments and columns"


def test_clients_that_write_at_once_share_a_reading_of_the_catalog(each_world: World) -> None:
    clients, read, go_on = 16, list[str](), threading.Event()
    written = threading.Barrier(clients + 1, action=go_on.set)

    def reading(*given: Any) -> None:
        """The first reading goes on once all have written, so they wait for it."""
        if given[2].startswith("SELECT galleries.id, galleries.name, galleries.version"):
            read.append(given[2])
            go_on.wait()

    def client(at: int) -> bool:
        each_world.upsert("old", [f"i{at}"], np.ones((1, 4)))
        written.wait()
        seen = each_world.galleries.announced().snapshot(GALLERY)
        return f"i{at}" in [view.ids[0] for view in seen.segments]

    event.listen(each_world.store.catalog.engine, "before_cursor_execute", reading)
    with ThreadPoolExecutor(clients + 1) as pool:
        first = pool.submit(each_world.galleries.announced)
        others = [pool.submit(client, at) for at in range(clients)]
        written.wait()
        first.result()
        assert all(other.result() for other in others)
    assert len(read) < clients + 1


def test_of_many_new_segments_all_are_read(each_world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr("gallery.snapshot._NAMED", 2)
    each_world.upsert("old", ["first"], np.zeros((1, 4)))
    each_world.galleries.refresh()
    for at in range(5):
        each_world.upsert("old", [f"i{at}"], np.full((1, 4), at))
    assert {hit.id for hit in each_world.search("old", np.zeros((1, 4))).hits(0)} == {
        "first",
        *(f"i{at}" for at in range(5)),
    }


def test_a_process_that_saw_segments_come_answers_as_one_that_opens_them_all_at_once(
    world: World,
) -> None:
    world.register("bits", 1024, "inner_product")
    world.make("coins", model="bits")
    rng, vectors = np.random.default_rng(0), np.zeros((4, 300, 1024), np.float32)
    vectors[:, :, :8] = rng.integers(0, 2, (4, 300, 8))  # many rows score alike
    for at, part in enumerate(vectors):
        world.upsert("bits", [f"{at}-{row}" for row in range(300)], part, gallery="coins")
        world.galleries.refresh()
    later = World.open(world.store.settings.data)
    shelves = [
        [len(shelf.segments) for shelf in each.galleries.refresh().snapshot("coins").shelves] for each in (world, later)
    ]
    query = np.zeros((1, 1024), np.float32)
    query[0, :8] = [1, 1, 1, 1, 1, 0, 0, 0]
    found, again = (each.search("bits", query, k=150, gallery="coins").plain(0) for each in (world, later))
    later.close()
    first = np.argsort(-(vectors.reshape(-1, 1024) @ query[0]), kind="stable")[:150]
    assert found == again
    assert [item for item, _, _ in found] == [f"{row // 300}-{row % 300}" for row in first]
    assert shelves[0] != shelves[1]
