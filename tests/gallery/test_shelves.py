"""Segments that are alike stand on one shelf, and every row stands there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gallery.arrays import Mask, Space
from gallery.columns import Ids
from gallery.index.base import Joins
from gallery.index.flat import FlatIndex
from gallery.lineage import Step
from gallery.shelves import Shelf, shelved
from gallery.views import Column, SegmentView

SPACE = Space("euclidean", normalized=False)
ROOM = 20
STEP = Step("map", "sha256", "old")


class Index(FlatIndex):
    """Exact search, with a room that is soon full."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.joins = Joins("flat", ROOM)


def view(number: int, rows: int, *, models: Sequence[str] = ("old",), side: bool = False, dead: int = 0) -> SegmentView:
    """A segment whose vectors are its number and the row."""
    vectors = np.stack([np.full(rows, number), np.arange(rows)], axis=1).astype(np.float32)
    columns = {
        name: Column(
            id=100 * number + at,
            model=name,
            origin="native" if name == "old" else "derived",
            lineage=() if name == "old" else (STEP,),
            vectors=vectors,
            index=Index(vectors, SPACE),
            index_file=None,
        )
        for at, name in enumerate(models)
    }
    selected: Mask | None = np.arange(rows) >= dead if dead else None
    ids = Ids(np.zeros(8 * (rows + 1), np.uint8), rows)
    return SegmentView(number, rows, ids, f"{number}.ids", vectors if side else None, columns, selected, rows - dead)


segments = st.lists(
    st.tuples(
        st.integers(1, 9), st.sampled_from([("old",), ("old", "new"), ("new",)]), st.booleans(), st.integers(0, 9)
    ),
    max_size=12,
).map(
    lambda drawn: [
        view(at, rows, models=models, side=side, dead=min(dead, rows))
        for at, (rows, models, side, dead) in enumerate(drawn)
    ]
)


def places(shelf: Shelf) -> list[tuple[int, int]]:
    at, rows = shelf.places(np.arange(shelf.rows))
    return list(zip(at.tolist(), rows.tolist(), strict=True))


@given(segments)
def test_every_row_stands_on_one_shelf_among_its_like(views: list[SegmentView]) -> None:
    shelves = shelved(views)
    found = [place for shelf in shelves for place in places(shelf)]
    assert sorted(found) == [(at, row) for at, view in enumerate(views) for row in range(view.rows)]
    for shelf in shelves:
        assert len({(frozenset(view.columns), view.side_dimension, view.live > 0) for view in shelf.segments}) == 1
        assert len(shelf.segments) == 1 or shelf.rows <= ROOM
        assert shelf.live == sum(view.live for view in shelf.segments)
        assert shelf.live == (shelf.rows if shelf.selected is None else shelf.selected.count)
        for name, index in shelf.indexes.items():
            found_there = index.search(np.array([[views[0].id, 0]], np.float32), shelf.rows, shelf.selected)
            rows = found_there.rows[found_there.rows >= 0]
            vectors = np.concatenate([view.columns[name].vectors for view in shelf.segments])
            assert len(set(rows.tolist())) == shelf.live
            assert np.array_equal(
                np.linalg.norm(vectors[rows] - [views[0].id, 0], axis=1).astype("f4"),
                found_there.scores[0][found_there.rows[0] >= 0],
            )


@given(segments, st.data())
def test_rows_and_places_belong_together(views: list[SegmentView], data: Any) -> None:
    for shelf in shelved(views):
        rows = np.array(sorted(data.draw(st.sets(st.integers(0, shelf.rows - 1)))), np.int64)
        told = [(at, own) for at, _, part in shelf.of(rows) for own in part.tolist()]
        segments, own = shelf.places(rows)
        assert told == list(zip(segments.tolist(), own.tolist(), strict=True))
        assert shelf.places(np.array([[-1]]))[0].tolist() == shelf.places(np.array([[-1]]))[1].tolist() == [[-1]]


def test_a_shelf_is_kept_with_its_indexes_while_nothing_of_it_changes() -> None:
    views = [view(at, 4) for at in range(3)]
    before = shelved(views)
    assert shelved(views, before)[0].indexes is before[0].indexes
    deleted = replace(views[1], selected=np.arange(4) > 0, live=3)
    after = shelved([views[0], deleted, views[2]], before)
    assert after[0].indexes is before[0].indexes
    assert after[0].selected is not None
    assert np.flatnonzero(~after[0].selected.mask).tolist() == [4]


def test_full_shelves_stay_as_they_are_when_others_come_and_go() -> None:
    views = [view(at, 8) for at in range(5)]  # two fill a shelf
    before = shelved(views)
    assert [len(shelf.segments) for shelf in before] == [2, 2, 1]
    after = shelved([*views[1:], view(9, 8)], before)
    kept = {id(shelf.indexes["old"]) for shelf in before} & {id(shelf.indexes["old"]) for shelf in after}
    assert kept == {id(before[1].indexes["old"])}
    assert sorted(place for shelf in after for place in places(shelf)) == [
        (at, row) for at in range(5) for row in range(8)
    ]


def test_a_column_that_gained_an_index_is_searched_by_it() -> None:
    views = [view(at, 4) for at in range(2)]
    before = shelved(views)
    column = views[0].columns["old"]
    indexed = replace(views[0], columns={"old": replace(column, index_file="it", index=Index(column.vectors, SPACE))})
    assert shelved([indexed, views[1]], before)[0].indexes["old"] is not before[0].indexes["old"]


def test_what_a_lone_segment_needed_in_memory_goes_with_its_shelf() -> None:
    views = [view(at, 4) for at in range(2)]
    (alone,) = shelved(views[:1])
    (both,) = shelved(views, [alone])
    assert both.indexes["old"] is not alone.indexes["old"] is not views[0].columns["old"].index
