"""A process catches up before it answers, once for all who wait, and nobody waits for long."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery.commits import Commits
from gallery.snapshot import Galleries
from service import catch_up
from service.catch_up import CatchUp
from service.errors import Unavailable
from tests.gallery.world import GALLERY, OLD, World

WAITERS = 8


class Slow(Galleries):
    """Galleries that read only once they may, and count how often they did."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.may, self.begun, self.readings = threading.Event(), threading.Event(), 0
        self.fails = False

    def refresh(self) -> Any:
        self.begun.set()
        assert self.may.wait(20)
        self.readings += 1
        if self.fails:
            raise OSError("the catalog is away")
        return super().refresh()


class Watched(CatchUp):
    """Tells of everyone who begins to wait."""

    def __init__(self, galleries: Galleries) -> None:
        super().__init__(galleries)
        self.waiting = threading.Semaphore(0)

    def _next(self) -> Any:
        reading = super()._next()
        self.waiting.release()
        return reading


class Stage:
    """A process that writes, and one that is behind it."""

    def __init__(self, folder: Path) -> None:
        self.world = World.open(folder / "world").prepare()
        Commits.make(folder / "commits", 2)
        store, writer, reader = self.world.store, Commits(folder / "commits", 0), Commits(folder / "commits", 1)
        self.writer = Galleries(store.catalog, store.files, commits=writer)
        self.reader = Slow(store.catalog, store.files, commits=reader)
        self.writer.refresh()
        self.reader.may.set()
        self.reader.refresh()
        self.reader.may.clear()
        self.reader.begun.clear()
        self.reader.readings = 0
        self.catch_up = Watched(self.reader)

    def write(self, item: str) -> None:
        self.world.upsert("old", [item], np.ones((1, OLD), np.float32))
        self.writer.announced()

    def live(self) -> int:
        return self.catch_up.world().snapshot(GALLERY).live


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_what_was_announced_is_seen(stage: Stage) -> None:
    stage.reader.may.set()
    for number in range(1, 4):
        stage.write(f"item-{number}")
        assert stage.live() == number
    assert stage.reader.readings == 3
    assert stage.live() == 3  # without reading again
    assert stage.reader.readings == 3


def test_all_who_wait_wait_for_the_same_reading(stage: Stage) -> None:
    stage.write("a")
    with ThreadPoolExecutor(WAITERS) as threads:
        found = [threads.submit(stage.live) for _ in range(WAITERS)]
        assert all(stage.catch_up.waiting.acquire(timeout=20) for _ in found)
        stage.reader.may.set()
        assert [each.result() for each in found] == [1] * WAITERS
    assert stage.reader.readings == 1


def test_so_do_those_on_the_event_loop(stage: Stage) -> None:
    stage.write("a")

    async def all_of_them() -> list[int]:
        asked = [asyncio.ensure_future(stage.catch_up.world_on_the_loop()) for _ in range(WAITERS)]
        await asyncio.to_thread(stage.reader.begun.wait, 20)
        asked[0].cancel()  # a client that hangs up
        stage.reader.may.set()
        return [world.snapshot(GALLERY).live for world in await asyncio.gather(*asked[1:])]

    assert asyncio.run(all_of_them()) == [1] * (WAITERS - 1)
    assert stage.reader.readings == 1


def test_a_reading_that_began_before_the_write_is_not_enough(stage: Stage) -> None:
    stage.write("a")
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(stage.live)
        assert stage.reader.begun.wait(20)
        newer = stage.reader._newer

        def write_meanwhile(*given: Any, **named: Any) -> Any:
            read = newer(*given, **named)
            if stage.reader.readings == 1:
                stage.write("b")
            return read

        stage.reader._newer = write_meanwhile  # type: ignore[method-assign]
        stage.reader.may.set()
        assert first.result() == 2
    assert stage.live() == 2


def test_nobody_waits_longer_than_that_and_the_next_not_at_all(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catch_up, "MOST_SECONDS", 0.05)
    stage.write("a")
    assert stage.live() == 0
    monkeypatch.setattr(catch_up, "MOST_SECONDS", 3600.0)
    started = time.monotonic()
    assert stage.live() == 0
    assert asyncio.run(stage.catch_up.world_on_the_loop()).snapshot(GALLERY).live == 0
    assert time.monotonic() - started < 60
    stage.reader.may.set()
    stage.write("b")  # is waited for again
    assert stage.live() == 2


def test_a_catalog_that_does_not_answer_stops_no_search(stage: Stage) -> None:
    stage.reader.may.set()
    stage.reader.fails = True
    stage.write("a")
    assert stage.live() == 0
    readings = stage.reader.readings
    assert stage.live() == 0
    assert stage.reader.readings == readings  # the thread that watches tries again, not every search
    stage.reader.fails = False
    stage.write("b")
    assert stage.live() == 2


def test_where_no_thread_can_be_started_searches_go_on_and_the_next_tries_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.reader.may.set()
    stage.write("a")
    with monkeypatch.context() as patch:
        patch.setattr(catch_up, "Thread", _none_left)
        assert stage.live() == 0
    stage.write("b")
    assert stage.live() == 2


def _none_left(**_: Any) -> Any:
    raise RuntimeError("can't start new thread")


def test_who_asks_for_what_is_not_there_waits_no_longer_either(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catch_up, "MOST_SECONDS", 0.05)
    stage.world.upsert("old", ["a"], np.ones((1, OLD), np.float32))  # and nobody announced it
    with pytest.raises(Unavailable):  # it cannot be said that it is not there
        stage.catch_up.once_more()
    monkeypatch.setattr(catch_up, "MOST_SECONDS", 20.0)
    stage.reader.may.set()
    assert stage.catch_up.once_more().snapshot(GALLERY).live == 1


def test_a_catalog_that_does_not_answer_is_no_reason_to_say_that_something_is_not_there(stage: Stage) -> None:
    stage.reader.may.set()
    stage.reader.fails = True
    with pytest.raises(OSError, match="the catalog is away"):
        stage.catch_up.once_more()
