"""An explained search is the search that everybody gets, with its time and what it missed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery.indexing import index_column, wanting
from gallery.search.explain import STEPS, Explained, explain, hits_found
from gallery.search.mapped import MappedColumns
from gallery.search.request import SearchRequest
from tests.gallery.world import BACKWARD, GALLERY, NEW, OLD, SIDE, WITH_SIDE, World, distance, found

SEGMENTS, ROWS = 3, 40
RANDOM = np.random.default_rng(7)
VECTORS = RANDOM.integers(-9, 10, (SEGMENTS, ROWS, OLD)).astype(np.float32)
SIDES = RANDOM.integers(-9, 10, (SEGMENTS, ROWS, SIDE)).astype(np.float32)
QUERY = RANDOM.integers(-9, 10, (1, NEW)).astype(np.float32)
COMPANION = RANDOM.integers(-9, 10, (1, OLD)).astype(np.float32)
DELETED = ("0-1", "2-5")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A gallery on its way to `new`: one segment has arrived."""
    found = World.open(tmp_path_factory.mktemp("explain"), min_candidates=1).prepare(
        ("forward", "old", "new", WITH_SIDE)
    )
    for at in range(SEGMENTS):
        found.upsert(
            "old",
            [f"{at}-{row}" for row in range(ROWS)],
            VECTORS[at],
            side=SIDES[at],
            payloads=[{"even": row % 2 == 0} for row in range(ROWS)],
        )
    found.delete(*DELETED)
    upgrade = found.start()
    while not found.search("new", QUERY, companions={"old": COMPANION}).coverage.direct:
        assert found.step(upgrade)
    yield found
    found.close()


def explained(world: World, **more: Any) -> Explained:
    given: dict[str, Any] = {"companions": {"old": COMPANION}, "k": 10, **more}
    return explain(world.searcher, world.galleries.refresh(), GALLERY, SearchRequest("new", QUERY, **given))


def test_it_finds_what_the_search_finds_and_says_how(world: World) -> None:
    told = explained(world, oversample=2)
    search = world.search("new", QUERY, companions={"old": COMPANION}, k=10, oversample=2)
    assert told.answer.hits(0) == search.hits(0)
    assert told.answer.scores.tobytes() == search.scores.tobytes()
    assert [each.way.route for each in told.steps if each.way] == ["direct", "forward"]
    assert [[view.live for view in each.shelf.segments] for each in told.steps] == [[39], [40, 39]]
    assert [each.candidates for each in told.steps] == [10, told.candidates] == [10, 20]


def test_exact_hits_are_those_of_every_live_row(world: World) -> None:
    exact = explained(world).exact
    mapped = {f"{at}-{row}": WITH_SIDE(VECTORS[at], SIDES[at])[row] for at in range(SEGMENTS) for row in range(ROWS)}
    expected = {item: distance(QUERY[0], vector) for item, vector in mapped.items() if item not in DELETED}
    assert [hit.score for hit in exact.hits(0)] == sorted(expected.values())[:10]
    assert all(expected[item] == score for item, score in found(exact).items())


def test_recall_tells_what_more_candidates_would_find(world: World) -> None:
    few, all_of_them = explained(world, oversample=1), explained(world, oversample=100)
    assert few.recall["direct"].share == 1
    assert few.recall["forward"].found < few.recall["forward"].hits
    assert few.total_recall.hits == 10
    assert all_of_them.total_recall.share == 1
    assert all_of_them.largest_difference == 0
    assert all_of_them.exact.hits(0) == all_of_them.answer.hits(0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("a9 b5 c5", "a b c"),
        ("a9 d5 e5", "a b c"),
        ("a9 c5 d5", "a b c"),
        ("b5 c5 d5", "b c"),
        ("d5 e5 f5", "b c"),
        ("a9 d5", "a b"),
        ("a9 b5 g4", "a b"),
        ("a9 b5 d4.99999999", "a b c"),
        ("", ""),
    ],
    ids=[
        "the same",
        "others in place of the last",
        "another in place of one",
        "the best is missed",
        "the best is missed by all",
        "too few",
        "a worse one",
        "rounded otherwise",
        "nothing",
    ],
)
def test_a_hit_that_scores_as_the_last_exact_one_is_found_in_its_place(answer: str, expected: str) -> None:
    def scored(hits: str) -> dict[tuple[int, int], float]:
        return {(0, ord(hit[0])): float(hit[1:]) for hit in hits.split()}

    assert hits_found(scored(answer), scored("a9 b5 c5")) == {(0, ord(hit)) for hit in expected.split()}
    assert hits_found(scored(answer), {}) == set()


def test_an_index_that_finds_others_of_many_equal_items_misses_nothing(tmp_path: Path) -> None:
    world = World.open(tmp_path, exact_below=8).prepare(index={"kind": "hnsw"})
    vectors = RANDOM.integers(-9, 10, (1000, OLD)).astype(np.float32)
    vectors[::2] = vectors[0]
    world.upsert("old", [f"{row}" for row in range(len(vectors))], vectors)
    while wanted := wanting(world.store):
        index_column(world.store, wanted[0])
    told = explain(world.searcher, world.galleries.refresh(), GALLERY, SearchRequest("old", vectors[:1], 10))
    assert {step.shelf.indexes["old"].kind for step in told.steps} == {"hnsw"}
    assert [hit.score for hit in told.answer.hits(0)] == [0] * 10
    assert told.exact.hits(0) != told.answer.hits(0)
    assert told.recall["direct"] == told.total_recall == (10, 10)
    world.close()


def test_a_filter_holds_for_the_exact_hits_too(world: World) -> None:
    told = explained(world, k=100, oversample=100, filter={"even": True})
    assert {int(item.partition("-")[2]) % 2 for item in found(told.exact)} == {0}
    assert told.total_recall.hits == told.total_recall.found == SEGMENTS * ROWS // 2


def test_what_cannot_be_reached_is_no_part_of_the_comparison(world: World) -> None:
    told = explained(world, companions={}, allow_partial=True)
    assert [each.way is None for each in told.steps] == [False, True]
    assert set(told.recall) == {"direct"}
    assert told.total_recall.share == 1


def test_each_step_has_its_own_time_and_together_they_take_no_longer_than_the_search(world: World) -> None:
    forgetful = replace(world.searcher, mapped=MappedColumns(world.store.transforms, 1 << 20))
    request = SearchRequest("new", QUERY, 10, companions={"old": COMPANION})
    seen, started = world.galleries.refresh(), time.perf_counter()
    told = explain(forgetful, seen, GALLERY, request)
    took = (time.perf_counter() - started) * 1000
    assert tuple(told.milliseconds) == STEPS
    assert all(told.milliseconds[step] > 0 for step in STEPS)
    assert sum(told.milliseconds.values()) + told.exact_ms <= took
    assert told.milliseconds["ask"] == pytest.approx(sum(each.ask_ms for each in told.steps))


def test_the_comparison_pushes_nothing_out_of_what_searches_keep(world: World) -> None:
    mapped = MappedColumns(world.store.transforms, 1 << 20)
    request = SearchRequest("new", QUERY, 2, companions={"old": COMPANION}, oversample=1)
    explain(replace(world.searcher, mapped=mapped), world.galleries.refresh(), GALLERY, request)
    assert sum(each.count for each in mapped._columns.values()) == 2


def test_a_segment_whose_rows_are_all_mapped_misses_nothing(tmp_path: Any) -> None:
    world = World.open(tmp_path).prepare(("forward", "old", "new", WITH_SIDE), ("backward", "new", "old", BACKWARD))
    world.upsert("old", ["a", "b"], VECTORS[0][:2], side=SIDES[0][:2])
    native = RANDOM.integers(-9, 10, (30, NEW)).astype(np.float32)
    world.upsert("new", [f"n-{row}" for row in range(30)], native)
    told = explain(world.searcher, world.galleries.refresh(), GALLERY, SearchRequest("old", COMPANION, 5))
    assert [each.way.exhaustive for each in told.steps if each.way] == [False, True]
    assert told.exact.hits(0) == told.answer.hits(0)
    assert told.milliseconds["transform"] > 0
    best = min(distance(COMPANION[0], vector) for vector in [*BACKWARD(native), *VECTORS[0][:2]])
    assert told.exact.hits(0)[0].score == best
    world.close()
