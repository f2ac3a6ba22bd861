"""Searches that reach the event loop together: one call, each its own answer; what fails is handed on, to be done alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from gallery.errors import GalleryError
from gallery.search.brief import AT_MOST, NotBrief
from gallery.search.request import Answer, SearchRequest
from gallery.snapshot import World as Seen
from service.errors import Unavailable
from service.gather import Gatherer
from service.metrics import Metrics
from service.slots import Slots
from tests.gallery.world import GALLERY, OLD, World

POISON = 1234.5


class Recording:
    """A searcher that tells how many queries each call had."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.oversample = world.searcher.oversample
        self.calls: list[int] = []

    def search(self, seen: Seen, gallery: str, request: SearchRequest, *, at_most: float) -> Answer:
        self.calls.append(len(request.vectors))
        if (request.vectors == POISON).any():
            raise MemoryError("poisoned")
        return self.world.searcher.search(seen, gallery, request, at_most=at_most)


class HandedOnError(Exception):
    """It is to be done in a thread by itself."""


class Asker:
    """One who waits for an answer."""

    def __init__(self) -> None:
        self.since = time.perf_counter()
        self.tasks = list[asyncio.Task[None]]()
        self.told: asyncio.Future[Found] = asyncio.get_running_loop().create_future()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    def answered(self, answer: Answer, query: int) -> None:
        self.told.set_result(Found(answer, query))

    def hand_on(self) -> None:
        self.told.set_exception(HandedOnError())

    def refuse(self, error: GalleryError) -> None:
        self.told.set_exception(error)


class Found(NamedTuple):
    answer: Answer
    query: int


class Stage:
    """A gallery of four items, and what gathers searches of it."""

    def __init__(self, world: World) -> None:
        world.upsert("old", ["a", "b", "c", "d"], np.eye(OLD, dtype=np.float32))
        self.seen = world.galleries.refresh()
        self.searcher, self.metrics = Recording(world), Metrics()
        self.slots = Slots(4, 0)
        self.gatherer = self.gathering(most=100)

    def gathering(self, *, most: int, lanes: int = 1) -> Gatherer:
        return Gatherer(self.searcher, self.metrics, self.slots, most=most, lanes=lanes)  # type: ignore[arg-type]

    def ask(self, axis: int, *, reads: int = 1, k: int = 1, poisoned: bool = False) -> asyncio.Future[Found]:
        vector = np.full((1, OLD), POISON, np.float32) if poisoned else np.eye(OLD, dtype=np.float32)[axis : axis + 1]
        asker = Asker()
        self.gatherer.ask(self.seen, GALLERY, SearchRequest("old", vector, k), reads, asker)
        self.tasks = asker.tasks
        return asker.told

    @staticmethod
    def id(found: Found) -> str:
        return found.answer.plain(found.query)[0][0]

    def counted(self, outcome: str) -> float:
        registry = CollectorRegistry()
        registry.register(self.metrics.counts)
        found = registry.get_sample_value("forwardfill_searches_total", {"outcome": outcome})
        return found or 0.0


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    world = World.open(tmp_path).prepare()
    yield Stage(world)
    world.close()


def test_those_of_one_turn_are_one_call_and_each_gets_its_own_answer(stage: Stage) -> None:
    async def together() -> list[str]:
        return [stage.id(each) for each in await asyncio.gather(*(stage.ask(axis) for axis in (2, 0, 3, 1, 0)))]

    assert asyncio.run(together()) == ["c", "a", "d", "b", "a"]
    assert stage.searcher.calls == [5]
    assert stage.counted("answered") == 5


def test_a_lone_search_is_a_call_of_its_own(stage: Stage) -> None:
    async def in_turn() -> list[str]:
        return [stage.id(await stage.ask(axis)) for axis in (1, 2)]

    assert asyncio.run(in_turn()) == ["b", "c"]
    assert stage.searcher.calls == [1, 1]


def test_those_that_differ_in_what_they_ask_are_asked_apart(stage: Stage) -> None:
    async def together() -> list[Found]:
        return await asyncio.gather(stage.ask(0), stage.ask(0, k=3), stage.ask(1))

    one, three, other = asyncio.run(together())
    assert [len(each.answer.plain(each.query)) for each in (one, three, other)] == [1, 3, 1]
    assert sorted(stage.searcher.calls) == [1, 2]


def test_one_call_reads_no_more_than_the_loop_may_be_held_for_and_others_get_their_turn_between(stage: Stage) -> None:
    turns: list[int] = []

    async def together() -> list[Found]:
        loop = asyncio.get_running_loop()
        asked = [stage.ask(axis % 4, reads=AT_MOST // 2) for axis in range(5)]
        loop.call_soon(lambda: turns.append(len(stage.searcher.calls)))
        return await asyncio.gather(*asked)

    assert [stage.id(each) for each in asyncio.run(together())] == ["a", "b", "c", "d", "a"]
    assert stage.searcher.calls == [2, 2, 1]
    assert turns == [1]


@pytest.mark.parametrize("others", [0, 2])
def test_where_one_fails_all_that_were_asked_together_are_handed_on_and_nothing_is_counted(
    stage: Stage, others: int
) -> None:
    async def together() -> list[Any]:
        asked = [stage.ask(0, poisoned=True), *(stage.ask(axis) for axis in range(others))]
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [type(each) for each in asyncio.run(together())] == [HandedOnError] * (1 + others)
    assert stage.searcher.calls == [1 + others]
    assert stage.counted("answered") == 0


def test_one_that_cannot_be_answered_keeps_no_other_waiting(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = Asker.answered

    def first_fails(asker: Asker, answer: Answer, query: int) -> None:
        if query == 0:
            raise MemoryError("no room for the answer")
        answered(asker, answer, query)

    monkeypatch.setattr(Asker, "answered", first_fails)

    async def together() -> list[Any]:
        return await asyncio.gather(stage.ask(0), stage.ask(1), return_exceptions=True)

    failed, found = asyncio.run(together())
    assert isinstance(failed, HandedOnError)
    assert stage.id(found) == "b"


def test_where_as_many_wait_as_may_the_next_is_told_at_once(stage: Stage) -> None:
    stage.gatherer = stage.gathering(most=2)

    async def together() -> list[Any]:
        return await asyncio.gather(*(stage.ask(axis) for axis in range(3)), return_exceptions=True)

    first, second, third = asyncio.run(together())
    assert (stage.id(first), stage.id(second)) == ("a", "b")
    assert isinstance(third, HandedOnError)


class Halting(Recording):
    """A searcher that never has the time; what is left of its searches is done when, and as, the test says."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.may_end = threading.Event()
        self.failure: Exception | None = None
        self.rests = self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    def search(self, seen: Seen, gallery: str, request: SearchRequest, *, at_most: float) -> Answer:
        answer = super().search(seen, gallery, request, at_most=at_most)
        halted = NotBrief("old-to-new")
        halted.rest = lambda: self._rest(answer)
        raise halted

    def _rest(self, answer: Answer) -> Answer:
        with self._lock:
            self.rests += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        self.may_end.wait(30)
        with self._lock:
            self._at_once -= 1
        if self.failure is not None:
            raise self.failure
        return answer


@pytest.fixture
def halting(stage: Stage) -> Halting:
    stage.searcher = Halting(stage.searcher.world)
    stage.gatherer = stage.gathering(most=100)
    return stage.searcher


def test_what_the_loop_has_no_time_for_goes_on_in_a_thread_and_the_loop_goes_on_too(
    stage: Stage, halting: Halting
) -> None:
    async def together() -> list[str]:
        asked = [stage.ask(axis) for axis in (2, 0)]
        asyncio.get_running_loop().call_later(0, halting.may_end.set)  # by the loop, which must not wait for it
        return [stage.id(each) for each in await asyncio.gather(*asked)]

    assert asyncio.run(together()) == ["c", "a"]
    assert (halting.calls, halting.rests) == ([2], 1), "nothing was begun again"
    assert stage.counted("answered") == 2


def test_no_more_go_on_at_once_than_there_are_lanes_and_slots_for_the_others_to_wait_in(
    stage: Stage, halting: Halting
) -> None:
    async def one_by_one() -> list[Any]:
        asked = [stage.ask(0, k=k) for k in (1, 2, 3, 4, 5, 6)]  # of six kinds
        loop = asyncio.get_running_loop()
        while halting.rests < 2 or len(halting.calls) < 6:
            await asyncio.sleep(0)
        loop.call_soon(halting.may_end.set)
        return await asyncio.gather(*asked, return_exceptions=True)

    stage.gatherer = stage.gathering(most=100, lanes=2)
    found = asyncio.run(one_by_one())
    assert halting.most_at_once == 2
    assert [type(each) for each in found].count(HandedOnError) == 2, "four have slots"
    assert stage.counted("answered") == 4


def test_those_that_fail_later_are_handed_on(stage: Stage, halting: Halting) -> None:
    halting.failure = MemoryError("later")
    halting.may_end.set()

    async def together(*axes: int) -> list[Any]:
        return await asyncio.gather(*map(stage.ask, axes), return_exceptions=True)

    assert [type(each) for each in asyncio.run(together(0))] == [HandedOnError]
    assert [type(each) for each in asyncio.run(together(0, 1))] == [HandedOnError] * 2
    assert stage.counted("answered") == 0


def test_what_still_goes_on_when_the_server_waits_no_longer_is_refused(stage: Stage, halting: Halting) -> None:
    async def cancelled() -> None:
        asked = stage.ask(0)
        while not halting.rests:
            await asyncio.sleep(0)
        (going_on,) = stage.tasks
        going_on.cancel()
        asyncio.get_running_loop().call_soon(halting.may_end.set)
        await asked

    with pytest.raises(Unavailable):
        asyncio.run(cancelled())
    assert stage.counted("answered") == 0
