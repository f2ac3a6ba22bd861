"""Which rows fit a filter is asked once, right for every snapshot, and kept within a bound."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event

from gallery import errors
from gallery.catalog import items as item_rows
from gallery.compact import merge
from gallery.search.filtering import ENTRY_BYTES, Filters
from tests.gallery.world import GALLERY, OLD, World

EVEN = {"even": True}


@pytest.fixture
def items(each_world: World) -> World:
    """Two segments of ten items, every other one of which is even."""
    for segment in "ab":
        add(each_world, segment)
    return each_world


def add(world: World, segment: str) -> None:
    payloads = [{"even": row % 2 == 0, "row": row, "in": segment} for row in range(10)]
    world.upsert("old", [f"{segment}{row}" for row in range(10)], np.ones((10, OLD), np.float32), payloads=payloads)


@pytest.fixture
def asked(items: World) -> Iterator[list[str]]:
    """Statements that read items."""
    statements: list[str] = []

    def listen(_c: object, _cursor: object, statement: str, *_: object) -> None:
        if "FROM items" in statement and "payload" in statement:
            statements.append(statement)

    event.listen(items.store.catalog.engine, "before_cursor_execute", listen)
    yield statements
    event.remove(items.store.catalog.engine, "before_cursor_execute", listen)


def fitting(world: World, filters: Filters, condition: dict[str, Any]) -> set[str]:
    snapshot = world.galleries.refresh().snapshot(GALLERY)
    found = set()
    for shelf, mask in zip(snapshot.shelves, filters.masks(snapshot, condition), strict=True):
        assert mask.shape == (shelf.rows,)
        found |= {view.ids[row] for _, view, rows in shelf.of(np.flatnonzero(mask)) for row in rows.tolist()}
    return found


def test_a_filter_that_comes_again_asks_for_new_segments_only(items: World, asked: list[str]) -> None:
    filters = Filters(items.store.catalog, 1 << 20)
    expected = {f"{segment}{row}" for segment in "ab" for row in range(0, 10, 2)}
    assert fitting(items, filters, EVEN) == expected
    assert fitting(items, filters, EVEN) == expected
    assert len(asked) == 1
    add(items, "c")
    assert fitting(items, filters, EVEN) == expected | {f"c{row}" for row in range(0, 10, 2)}
    assert len(asked) == 2
    assert fitting(items, filters, {"row": {"lt": 1}}) == {"a0", "b0", "c0"}
    assert len(asked) == 3


def test_a_filter_of_segments_that_are_gone_is_refused_and_not_answered_with_nothing(items: World) -> None:
    filters = Filters(items.store.catalog, 1 << 20)
    snapshot = items.galleries.refresh().snapshot(GALLERY)
    items.compact()
    assert sum(mask.sum() for mask in filters.masks(snapshot, EVEN)) == 10  # merged, and still known
    merge.reclaim(items.store, -1)
    assert sum(mask.sum() for mask in filters.masks(snapshot, EVEN)) == 10  # as it was found before
    with pytest.raises(errors.Outdated, match="search again"):
        filters.masks(snapshot, {"row": {"lt": 1}})
    with items.store.catalog.reading() as session, pytest.raises(errors.Outdated, match="search again"):
        item_rows.payloads(session, [(snapshot.segments[0].id, 0)])


def test_the_order_of_names_makes_no_other_filter(items: World, asked: list[str]) -> None:
    filters = Filters(items.store.catalog, 1 << 20)
    assert fitting(items, filters, {"even": True, "in": "a"}) == fitting(items, filters, {"in": "a", "even": True})
    assert len(asked) == 1


def test_what_is_no_filter_is_refused_whatever_is_known_and_also_where_there_is_nothing_to_find(items: World) -> None:
    filters = Filters(items.store.catalog, 1 << 20)
    deep: dict[str, Any] = {"row": 1}
    for _ in range(5000):
        deep = {"not": deep}
    assert fitting(items, filters, {"row": None}) == set()
    items.make("empty")
    for gallery in (GALLERY, "empty"):
        snapshot = items.galleries.refresh().snapshot(gallery)
        for wrong in (
            {"row": math.inf},
            {"row": {"in": [math.nan]}},
            {"row": 1 << 64},
            {"row": {}},
            {"\ud800": 1},
            deep,
        ):
            with pytest.raises(errors.InvalidFilter):
                filters.masks(snapshot, wrong)


def test_no_more_is_kept_than_the_bound_and_what_is_used_stays(items: World, asked: list[str]) -> None:
    filters = Filters(items.store.catalog, 2 * 2 * (ENTRY_BYTES + 10))  # two filters of two segments of ten rows
    for row in (0, 1, 0, 2, 0):
        assert fitting(items, filters, {"row": row}) == {f"a{row}", f"b{row}"}
    assert len(asked) == 3
    assert fitting(items, filters, {"row": 1}) == {"a1", "b1"}
    assert len(asked) == 4


def test_what_is_kept_takes_no_more_memory_than_the_bound_however_small_the_segments_and_long_the_filters(
    items: World,
) -> None:
    limit = 20_000
    filters = Filters(items.store.catalog, limit)
    snapshot = items.galleries.refresh().snapshot(GALLERY)
    for row in range(40):
        filters.masks(snapshot, {"row": row, "in": str(row) * 1000})
    assert 0 < size(filters._known) <= limit


def size(known: Mapping[tuple[bytes, int], Any]) -> int:
    """What a dictionary of masks takes in memory, each object counted once."""
    objects = {id(each): each for (name, segment), mask in known.items() for each in (name, segment, mask)}
    return sum(map(sys.getsizeof, [known, *known, *objects.values()]))


def test_without_memory_every_search_asks(items: World, asked: list[str]) -> None:
    filters = Filters(items.store.catalog, 0)
    for _ in range(2):
        assert len(fitting(items, filters, EVEN)) == 10
    assert len(asked) == 2


def test_what_was_kept_is_right_after_deletions_and_upserts(items: World) -> None:
    def found() -> set[str]:
        answer = items.search("old", [np.ones(OLD)], k=100, filter=EVEN)
        return {hit.id for hit in answer.hits(0)}

    before = found()
    items.delete("a0")
    items.upsert("old", ["a2", "a1"], np.ones((2, OLD), np.float32), payloads=[{"even": False}, {"even": True}])
    assert found() == before - {"a0", "a2"} | {"a1"}


def test_a_merge_changes_nothing_of_what_fits(items: World) -> None:
    filters = Filters(items.store.catalog, 1 << 20)
    before = fitting(items, filters, EVEN)
    items.compact(rows=1000)
    assert len(items.galleries.refresh().snapshot(GALLERY).segments) == 1
    assert fitting(items, filters, EVEN) == before


def test_a_filter_that_cannot_be_compiled_is_refused_each_time(items: World) -> None:
    searcher = replace(items.searcher, filters=Filters(items.store.catalog, 1 << 20))
    items.searcher = searcher
    for _ in range(2):
        with pytest.raises(errors.InvalidFilter):
            items.search("old", [np.ones(OLD)], filter={"row": {"near": 1}})
