"""Searches that are done together: right, bounded, never late, and no one's error is another's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from gallery.arrays import Metric
from gallery.search.coalesce import Coalescer
from gallery.search.request import Answer, SearchRequest
from gallery.search.run import Searcher
from gallery.snapshot import World as Seen
from gallery.together import Together
from tests.gallery.gathering import WAIT, Watched
from tests.gallery.world import GALLERY, NEW, OLD, PLAIN, World

POISON = 1234.5


class Gated:
    """A searcher whose calls are recorded and go on when they are let."""

    def __init__(self, searcher: Searcher) -> None:
        self._searcher = searcher
        self.calls: list[SearchRequest] = []
        self.threads: list[int] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()

    def search(self, world: Seen, gallery: str, request: SearchRequest) -> Answer:
        self.calls.append(request)
        self.threads.append(threading.get_ident())
        self.entered.release()
        assert self.gate.wait(WAIT)
        if (request.vectors == POISON).any():
            raise MemoryError
        return self._searcher.search(world, gallery, request)


class Crowd:
    """Threads that search, with one search that holds the only lane until `go`."""

    def __init__(self, world: World, pool: ThreadPoolExecutor) -> None:
        self.seen = world.galleries.refresh()
        self.gated = Gated(world.searcher)
        self.together = Watched(1)
        self.coalescer = Coalescer(self.gated, self.together)
        self._pool = pool

    def start(self, request: SearchRequest, seen: Seen | None = None, at_once: int = 1000) -> Future[Answer]:
        world = seen or self.seen
        return self._pool.submit(self.coalescer.search, world, GALLERY, request, at_once=at_once)

    def hold(self, request: SearchRequest, at_once: int = 1000) -> Future[Answer]:
        """The first search: it takes the lane, and stays."""
        holding = self.start(request, at_once=at_once)
        assert self.gated.entered.acquire(timeout=WAIT)
        return holding

    def gather(self, *requests: SearchRequest, at_once: int = 1000) -> list[Future[Answer]]:
        """Searches that wait in the line, in this order."""
        waiting = []
        for request in requests:
            waiting.append(self.start(request, at_once=at_once))
            assert self.together.one_more_waits()
        return waiting

    def go(self) -> None:
        """Let every search run."""
        self.gated.gate.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as threads:
        yield threads


METRICS: tuple[Metric, ...] = ("cosine", "inner_product", "euclidean")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Three segments of vectors that are not whole numbers, some rows deleted; and a gallery of each metric."""
    found = World.open(tmp_path_factory.mktemp("coalesce")).prepare(("forward", "old", "new", PLAIN))
    for metric in METRICS:
        found.register(metric, OLD, metric)
        found.make(metric, model=metric)
    random = np.random.default_rng(5)
    for segment in range(3):
        ids = [f"{segment}-{at}" for at in range(60)]
        for model, gallery in [("old", GALLERY), *zip(METRICS, METRICS, strict=True)]:
            found.upsert(model, ids, random.normal(size=(60, OLD)), gallery=gallery)
    for gallery in (GALLERY, *METRICS):
        found.delete("0-3", "2-7", gallery=gallery)
    yield found
    found.close()


def queries(count: int, seed: int = 1, dimension: int = OLD) -> list[Any]:
    return list(np.random.default_rng(seed).normal(size=(count, 1, dimension)).astype(np.float32))


def request(vector: Any, **more: Any) -> SearchRequest:
    return SearchRequest("old", vector, **{"k": 5, **more})


def same(one: Answer, other: Answer) -> bool:
    """Ids, places and the bits of the scores."""
    return (
        one.hits(0) == other.hits(0)
        and one.scores.tobytes() == other.scores.tobytes()
        and (one.score_space, one.coverage) == (other.score_space, other.coverage)
    )


def test_a_lone_search_runs_at_once_in_its_own_thread(world: World) -> None:
    gated = Gated(world.searcher)
    gated.gate.set()
    seen, (vector,) = world.galleries.refresh(), queries(1)
    answer = Coalescer(gated, Together(1)).search(seen, GALLERY, request(vector), at_once=1000)
    assert gated.threads == [threading.get_ident()]
    assert same(answer, world.searcher.search(seen, GALLERY, request(vector)))


@pytest.mark.parametrize("count", [2, 12])  # few are compared one by one, many by a matrix product
def test_what_gathers_is_one_call_and_answers_as_it_would_alone(
    world: World, pool: ThreadPoolExecutor, count: int
) -> None:
    crowd, vectors = Crowd(world, pool), queries(count + 1)
    answers = [crowd.hold(request(vectors[0])), *crowd.gather(*map(request, vectors[1:]))]
    crowd.go()
    for vector, answer in zip(vectors, answers, strict=True):
        assert same(answer.result(WAIT), world.searcher.search(crowd.seen, GALLERY, request(vector)))
    assert [len(call.vectors) for call in crowd.gated.calls] == [1, count]


def test_companions_go_with_their_queries(world: World, pool: ThreadPoolExecutor) -> None:
    crowd = Crowd(world, pool)
    whole = np.random.default_rng(2).integers(-9, 9, (6, 1, OLD)).astype(np.float32)
    asked = [
        SearchRequest("new", np.asarray(old @ np.array(PLAIN.embedding, np.float32)), 5, companions={"old": old})
        for old in whole
    ]
    answers = [crowd.hold(asked[0]), *crowd.gather(*asked[1:])]
    crowd.go()
    for each, answer in zip(asked, answers, strict=True):
        assert each.vectors.shape == (1, NEW)
        assert same(answer.result(WAIT), world.searcher.search(crowd.seen, GALLERY, each))
    assert len(crowd.gated.calls) == 2
    assert answers[0].result().coverage.forward == 178


@pytest.mark.parametrize("metric", METRICS)
def test_many_threads_that_search_as_they_like_get_the_answers_of_searches_alone(
    world: World, pool: ThreadPoolExecutor, metric: Metric
) -> None:
    seen, vectors = world.galleries.refresh(), queries(24)
    asked = [SearchRequest(metric, vector, 5) for vector in vectors]
    alone = [world.searcher.search(seen, metric, each) for each in asked]
    together, barrier = Watched(2), threading.Barrier(12)
    coalescer = Coalescer(world.searcher, together)

    def run(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(len(asked)).tolist()
        barrier.wait(WAIT)
        return all(same(coalescer.search(seen, metric, asked[at], at_once=4), alone[at]) for at in order)

    assert all(pool.map(run, range(12)))
    assert together.idle, "a lane was never given back"


@pytest.mark.parametrize(
    "change",
    [
        lambda vector: request(vector, k=6),
        lambda vector: request(vector, oversample=3),
        lambda vector: request(vector, allow_partial=True),
        lambda vector: request(vector, filter={"axis": 1}),
        lambda vector: request(vector, companions={"cosine": vector}),
        lambda vector: SearchRequest("euclidean", vector, 5, allow_partial=True),
        lambda vector: request(np.concatenate([vector, vector])),
    ],
)
def test_what_is_asked_otherwise_waits_for_nobody(
    world: World, pool: ThreadPoolExecutor, change: Callable[[Any], SearchRequest]
) -> None:
    crowd, (first, second) = Crowd(world, pool), queries(2)
    crowd.hold(request(first))
    other = crowd.start(change(second))
    assert crowd.gated.entered.acquire(timeout=WAIT), "it waits although it could not be done together"
    crowd.go()
    assert len(other.result(WAIT).rows) == len(change(second).vectors)


def test_searches_of_two_versions_are_not_done_together(world: World, pool: ThreadPoolExecutor) -> None:
    crowd, (vector,) = Crowd(world, pool), queries(1)
    before = crowd.hold(request(vector))
    world.upsert("old", ["nearest"], vector)
    after = crowd.start(request(vector), world.galleries.refresh())
    world.delete("nearest")
    assert crowd.gated.entered.acquire(timeout=WAIT)
    crowd.go()
    assert after.result(WAIT).hits(0)[0].id == "nearest"
    assert "nearest" not in {hit.id for hit in before.result(WAIT).hits(0)}


def test_a_call_has_no_more_queries_than_it_may(world: World, pool: ThreadPoolExecutor) -> None:
    crowd, vectors = Crowd(world, pool), queries(8)
    answers = [crowd.hold(request(vectors[0]), at_once=3), *crowd.gather(*map(request, vectors[1:]), at_once=3)]
    crowd.go()
    for answer in answers:
        answer.result(WAIT)
    assert [len(call.vectors) for call in crowd.gated.calls] == [1, 3, 3, 1]


def test_an_error_reaches_the_search_that_caused_it_and_no_other(world: World, pool: ThreadPoolExecutor) -> None:
    crowd, vectors = Crowd(world, pool), queries(5)
    vectors[2] = np.full((1, OLD), POISON, np.float32)
    answers = [crowd.hold(request(vectors[0])), *crowd.gather(*map(request, vectors[1:]))]
    crowd.go()
    for at, answer in enumerate(answers):
        if at == 2:
            with pytest.raises(MemoryError):
                answer.result(WAIT)
        else:
            assert same(answer.result(WAIT), world.searcher.search(crowd.seen, GALLERY, request(vectors[at])))


def test_a_search_that_fails_in_its_lane_lets_the_next_ones_in(world: World, pool: ThreadPoolExecutor) -> None:
    crowd, vectors = Crowd(world, pool), queries(3)
    failing = crowd.hold(request(np.full((1, OLD), POISON, np.float32)))
    answers = crowd.gather(*map(request, vectors))
    crowd.go()
    with pytest.raises(MemoryError):
        failing.result(WAIT)
    for vector, answer in zip(vectors, answers, strict=True):
        assert same(answer.result(WAIT), world.searcher.search(crowd.seen, GALLERY, request(vector)))
    assert crowd.together.idle
