"""What a process reads of the catalog, and opens, to see what changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
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
