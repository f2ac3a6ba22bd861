"""Which searches are done on the event loop: those that read little, and transform little."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery.arrays import Space
from gallery.index._ivf import IvfIndex
from gallery.index.base import Index
from gallery.index.flat import FlatIndex
from gallery.search.brief import NotBrief
from gallery.search.mapped import MappedColumns
from gallery.search.request import SearchRequest
from gallery.search.run import ready_plan_for
from gallery.snapshot import Snapshot
from tests.gallery.world import BACKWARD, GALLERY, NEW, OLD, PLAIN, World

SPACE = Space("euclidean", normalized=False)


def reads(world: World, snapshot: Snapshot, model: str = "old") -> int | None:
    """What a search of a model reads, with a companion of the other."""
    width = {"old": OLD, "new": NEW}
    vectors = {name: np.ones((1, size), np.float32) for name, size in width.items()}
    seen = replace(world.galleries.current, galleries={GALLERY: snapshot})
    return ready_plan_for(seen, snapshot, SearchRequest(model, vectors.pop(model), 10, companions=vectors)).reads


def grown(seen: Snapshot, rows: int, *, nprobe: int | None = None) -> Snapshot:
    """The same with one segment of so many rows, which nobody reads: exact, or as if in a hundred lists."""
    view = seen.segments[0]
    column = view.columns["old"]
    wide = np.broadcast_to(np.zeros(column.vectors.shape[1], np.float32), (rows, column.vectors.shape[1]))
    index: Index = FlatIndex(wide, SPACE)
    if nprobe is not None:
        index = Listed("ivf", np.zeros((100, wide.shape[1]), np.float32), nprobe=nprobe, vectors=wide, space=SPACE)
    large = replace(column, id=column.id + 1, vectors=wide, index=index)
    return seen.of([replace(view, columns={"old": large}, rows=rows, live=rows)])


class Listed(IvfIndex):
    """Lists without anything in them."""

    lists = None


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Five items of the old model, and a map of them to the new one."""
    found = World.open(tmp_path).prepare(("forward", "old", "new", PLAIN))
    found.upsert("old", list("abcde"), np.random.default_rng(0).standard_normal((5, OLD)))
    yield found
    found.close()


def seen(world: World) -> Snapshot:
    return world.galleries.refresh().snapshot(GALLERY)


def test_a_search_reads_what_its_indexes_read_whichever_the_route(world: World) -> None:
    assert reads(world, seen(world)) == 5 * OLD
    assert reads(world, seen(world), "new") == 5 * OLD


def test_of_many_rows_an_index_spares_reading_most(world: World) -> None:
    large = grown(seen(world), 100_000)
    assert reads(world, large) == 100_000 * OLD
    assert reads(world, grown(large, 100_000, nprobe=2)) == OLD * (100 + 2000)


def test_where_every_row_is_a_candidate_nobody_says_how_much_that_is(tmp_path: Path) -> None:
    world = World.open(tmp_path).prepare(("backward", "new", "old", BACKWARD))
    world.upsert("old", ["a"], np.ones((1, OLD), np.float32))
    world.upsert("new", ["b"], np.ones((1, NEW), np.float32))
    snapshot = seen(world)
    alone = SearchRequest("old", np.ones((1, OLD), np.float32), 10)
    assert ready_plan_for(world.galleries.current, snapshot, alone).reads is None
    world.close()


def asked(world: World, at_most: float) -> list[str]:
    request = SearchRequest(
        "new", np.ones((1, NEW), np.float32), 3, companions={"old": np.ones((1, OLD), np.float32)}, oversample=1
    )
    answer = world.searcher.search(world.galleries.current, GALLERY, request, at_most=at_most)
    return [hit.id for hit in answer.hits(0)]


def test_a_search_that_would_have_to_transform_too_much_says_so_instead(world: World) -> None:
    seen(world)
    weights = PLAIN.weights
    with pytest.raises(NotBrief, match="forward"):  # nobody has loaded the transformation yet
        asked(world, 1e9)
    expected = asked(world, math.inf)
    forgetful = replace(world.searcher, mapped=MappedColumns(world.store.transforms, 0))
    world.searcher, kept = forgetful, world.searcher
    with pytest.raises(NotBrief) as halted:
        asked(world, 5 * weights - 1)
    assert halted.value.rest is not None
    assert [hit.id for hit in halted.value.rest().hits(0)] == expected
    assert asked(world, 5 * weights) == expected
    world.searcher = kept
    assert asked(world, 0) == expected, "what is known already need not be transformed"


def test_a_search_that_goes_on_asks_no_index_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen(world)
    times: list[int] = []
    search = FlatIndex.search

    def counted(index: FlatIndex, *given: Any) -> Any:
        times.append(1)
        return search(index, *given)

    monkeypatch.setattr(FlatIndex, "search", counted)
    with pytest.raises(NotBrief) as halted:
        asked(world, 0)
    assert halted.value.rest is not None
    assert len(halted.value.rest().hits(0)) == 3
    assert len(times) == 1
