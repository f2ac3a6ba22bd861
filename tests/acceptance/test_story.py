"""A gallery is upgraded while it is searched, written to, and robbed of its processes: the whole story, on both stacks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
from sqlalchemy import text

from tests.acceptance.forks import Nursery
from tests.acceptance.gallery_world import Traffic, World
from tests.acceptance.system import Process, System, children, ok, running, wait_for

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

#: Segments stay as they are written: a test that waits for the third of ten would wait in vain for the one that a merge made.
SETTINGS = {"lease_seconds": "2", "compact_segments": "0"}
# A second is the promise; a machine whose cores are all busy is given more, since this is no timing test.
SEEN_SECONDS = 10.0
_numbers = count()


class Stack:
    """A running system, and how to lose every message of its broker."""

    def __init__(self, system: System, lose_messages: Callable[[], Any]) -> None:
        self.system = system
        self.lose_messages = lose_messages

    @property
    def http(self) -> httpx.Client:
        return self.system.apis[0].http

    @property
    def last(self) -> httpx.Client:
        return self.system.apis[-1].http


@pytest.fixture(scope="module", params=["embedded", "production"])
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, nursery: Nursery
) -> Iterator[Stack]:
    """Embedded: SQLite, messages in files. Production: PostgreSQL, Redis, two API processes, two workers.

    One for all tests: each has models and a gallery of its own, and starts again what it killed.
    """
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "embedded":
        with running(System(folder, spawn=nursery.spawn, **SETTINGS)) as system:
            system.add_api("--no-worker")
            system.add_worker()
            yield Stack(system, lambda: _remove_files(system.data / "broker" / "messages"))
        return
    broker, server = request.getfixturevalue("redis_server"), request.getfixturevalue("postgres_server")
    with request.getfixturevalue("postgres_admin").connect() as connection:
        connection.execute(text("CREATE DATABASE story"))
    url = server.set(database="story").render_as_string(hide_password=False)
    settings = {"database_url": url, "broker_url": broker, **SETTINGS}
    with running(System(folder, spawn=nursery.spawn, **settings)) as system:
        system.migrate()
        for _ in range(2):
            system.add_api("--no-worker")
            system.add_worker()
        with redis.Redis.from_url(broker) as client:
            yield Stack(system, client.flushall)


@pytest.fixture
def world(stack: Stack, tmp_path: Path, request: pytest.FixtureRequest) -> World:
    """Models, a transformation and an empty gallery that only this test has; what a failed test killed is started."""
    for process in (*stack.system.apis, *stack.system.workers):
        if process.popen.poll() is not None:
            process.start()
    made = World(tmp_path / "fct.safetensors", f"g{next(_numbers)}", hidden=getattr(request, "param", 64))
    made.register(stack.http)
    return made


def test_a_gallery_is_upgraded_in_place_while_it_is_searched_and_processes_are_killed(
    stack: Stack, world: World
) -> None:
    for start in range(0, 600, 25):
        world.upsert(stack.http if start % 2 else stack.last, [f"item-{n}" for n in range(start, start + 25)])
    wait_until_seen(stack.http, world, len(world.items))
    assert world.check(stack.http)["served"]["routes"]["forward"] == 600

    with Traffic(world, [str(api.http.base_url) for api in stack.system.apis]) as traffic:
        started = stack.http.post(
            "/admin/upgrades",
            json={
                "gallery": world.gallery,
                "transformation": world.transformation,
                "throttle": {"items_per_second": 150},
            },
        )
        assert started.status_code == 202, started.text
        upgrade = started.json()["id"]

        wait_for(lambda: progress(stack.last, upgrade)["segments_done"] >= 3, 60, lambda: "no segment was done")
        stack.system.workers[0].kill()
        world.upsert(stack.http, [f"late-{n}" for n in range(40)])
        world.upsert(stack.http, [f"item-{n}" for n in range(10)])
        world.delete(stack.http, [f"item-{n}" for n in range(100, 110)])
        stack.lose_messages()
        stack.system.workers[0].start()
        stack.lose_messages()
        wait_for(lambda: state(stack.last, upgrade) == "completed", 90, lambda: str(document(stack.last, upgrade)))
        # What the process said, its next search knows.
        assert world.check(stack.last)["served"]["routes"]["forward"] == 0

    assert traffic.failures == []
    assert traffic.searches > 20
    wait_until_seen(stack.last, world, len(world.items))
    for api in stack.system.apis:
        wait_until_direct(api.http, world)
        world.check(api.http)

    payload = world.search(stack.http, world.new, world.query()[1], k=1, include=["payload"])["hits"][0]
    assert payload["payload"] == {"name": payload["id"]}

    old, _ = world.query()
    before = world.search(stack.http, world.old, old, k=50)["hits"]
    assert stack.http.post(f"/admin/upgrades/{upgrade}/rollback").status_code == 202
    assert world.search(stack.http, world.old, old, k=50)["hits"] == before
    assert world.check(stack.http)["served"]["routes"]["forward"] == len(world.items)


@pytest.mark.parametrize("stack", ["production"], indirect=True)
@pytest.mark.parametrize("world", [2048], indirect=True)
def test_kill_9_of_the_worker_in_the_middle_of_a_segment_costs_time_and_nothing_else(
    stack: Stack, world: World
) -> None:
    world.upsert(stack.http, [f"item-{n}" for n in range(10_000)])
    upgrade = ok(
        stack.http.post("/admin/upgrades", json={"gallery": world.gallery, "transformation": world.transformation})
    )["id"]

    victim = wait_for(lambda: writing(stack.system), 60, lambda: str(document(stack.http, upgrade)))
    for worker in victim:
        worker.kill()
    assert progress(stack.http, upgrade)["segments_done"] == 0, "it was killed after the segment, not in its middle"
    assert state(stack.http, upgrade) == "running"
    for worker in victim:
        worker.start()

    wait_for(lambda: state(stack.http, upgrade) == "completed", 120, lambda: str(document(stack.http, upgrade)))
    assert progress(stack.http, upgrade)["items_done"] == 10_000
    wait_until_direct(stack.http, world)
    answer = world.search(stack.http, world.new, world.query()[1], k=1000)
    assert answer["served"]["routes"]["direct"] == 10_000
    assert len({hit["id"] for hit in answer["hits"]}) == 1000


def test_kill_9_of_the_api_in_the_middle_of_an_upsert_leaves_all_of_it_or_nothing(stack: Stack, world: World) -> None:
    """The kill comes when the request has written its second file; `make faults` has the other moments."""
    world.upsert(stack.http, ["kept-1", "kept-2"])
    columns = stack.system.data / "columns"
    there = len(list(columns.rglob("*")))
    api = stack.system.apis[0]
    unknown = [f"item-{n}" for n in range(10_000)]
    acknowledged = threading.Event()

    def write() -> None:
        try:
            with httpx.Client(base_url=api.http.base_url, timeout=60) as http:
                world.upsert(http, unknown)
            acknowledged.set()
        except httpx.TransportError:
            pass

    writer = threading.Thread(target=write)
    writer.start()
    wait_for(lambda: len(list(columns.rglob("*"))) >= there + 2, 60, lambda: "the upsert wrote nothing")
    api.kill()
    writer.join()
    api.start()

    items = ok(api.http.get(f"/galleries/{world.gallery}"))["items"]
    assert items in ({10_002} if acknowledged.is_set() else {2, 10_002})
    if items == 2:
        world.upsert(api.http, unknown)
    answer = world.search(api.http, world.old, np.zeros(16, np.float32), k=1000)
    assert sum(answer["served"]["routes"].values()) == 10_002
    assert len({hit["id"] for hit in answer["hits"]}) == 1000
    assert ok(api.http.get(f"/galleries/{world.gallery}/items/kept-1"))["payload"] == {"name": "kept-1"}


@pytest.mark.parametrize("stack", ["production"], indirect=True)
def test_a_worker_that_is_told_to_stop_finishes_or_releases_its_segment(stack: Stack, world: World) -> None:
    for start in range(0, 200, 20):
        world.upsert(stack.http, [f"item-{n}" for n in range(start, start + 20)])
    throttle = {"items_per_second": 5}  # a segment in 4 s: none of them finishes all while others stop
    upgrade = ok(
        stack.http.post(
            "/admin/upgrades",
            json={"gallery": world.gallery, "transformation": world.transformation, "throttle": throttle},
        )
    )["id"]
    wait_for(lambda: progress(stack.http, upgrade)["segments_done"] >= 1, 60, lambda: "no segment was done")

    assert [worker.stop() for worker in stack.system.workers] == [0] * len(stack.system.workers)
    done = progress(stack.http, upgrade)["segments_done"]
    assert state(stack.http, upgrade) == "running"
    ok(stack.http.patch(f"/admin/upgrades/{upgrade}", json={"throttle": {"items_per_second": None}}))
    for worker in stack.system.workers:
        worker.start()
    wait_for(lambda: state(stack.http, upgrade) == "completed", 60, lambda: str(document(stack.http, upgrade)))
    assert progress(stack.http, upgrade)["segments_done"] == 10 > done
    wait_until_seen(stack.http, world, 200)
    world.check(stack.http)


def test_serve_runs_a_worker_of_its_own_and_replaces_it_when_it_dies(tmp_path: Path) -> None:
    with running(System(tmp_path, **SETTINGS)) as system:
        api = system.add_api()
        world = World(tmp_path / "fct.safetensors", "alone")
        world.register(api.http)
        world.upsert(api.http, [f"item-{n}" for n in range(50)])
        child = wait_for(lambda: children(api.popen.pid), 30, lambda: "no worker was started")
        for pid in child:
            os.kill(pid, signal.SIGKILL)
        upgrade = ok(api.http.post("/admin/upgrades", json={"gallery": world.gallery, "target_model": world.new}))["id"]
        wait_for(lambda: state(api.http, upgrade) == "completed", 60, lambda: str(document(api.http, upgrade)))
        world.check(api.http)
        workers = children(api.popen.pid)
        assert workers
        assert api.stop() == 0
        assert not any(alive(pid) for pid in workers), "the worker outlived its parent"


@pytest.mark.parametrize("stack", ["embedded"], indirect=True)
def test_an_upgrade_is_run_from_the_command_line(stack: Stack, world: World) -> None:
    world.upsert(stack.http, [f"item-{n}" for n in range(30)])

    def forwardfill(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "forwardfill", *words],
            env={**os.environ, "FORWARDFILL_URL": str(stack.http.base_url), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    started = forwardfill("upgrade", "start", world.gallery, "--target", world.new)
    assert f"{world.gallery}: completed, 100%" in started
    upgrade = started.split()[1]
    assert upgrade in forwardfill("upgrade", "list")
    assert world.new in forwardfill("models", "list")
    assert world.gallery in forwardfill("galleries", "list")
    assert '"derived_items": 30' in forwardfill("galleries", "show", world.gallery)
    assert "completed" in forwardfill("upgrade", "watch", upgrade)
    assert "rolled_back" in forwardfill("upgrade", "rollback", upgrade)


def document(http: httpx.Client, upgrade: str) -> dict[str, Any]:
    found: dict[str, Any] = ok(http.get(f"/admin/upgrades/{upgrade}"))
    return found


def state(http: httpx.Client, upgrade: str) -> str:
    return str(document(http, upgrade)["state"])


def progress(http: httpx.Client, upgrade: str) -> dict[str, Any]:
    found: dict[str, Any] = document(http, upgrade)["progress"]
    return found


def wait_until_seen(http: httpx.Client, world: World, items: int) -> None:
    """Wait until what was written at one process is seen by another."""

    def seen() -> bool:
        answer = world.search(http, world.old, np.zeros(16, np.float32), k=1)
        return sum(answer["served"]["routes"].values()) == items

    wait_for(seen, SEEN_SECONDS, lambda: f"{items} items are not seen")


def wait_until_direct(http: httpx.Client, world: World) -> None:
    """Wait until a process has seen that the upgrade is complete."""

    def direct() -> bool:
        old, new = np.zeros(16, np.float32), np.zeros(24, np.float32)
        answer = world.search(http, world.new, new, k=1, companions={world.old: old})
        return bool(answer["served"]["routes"]["forward"] == 0)

    wait_for(direct, SEEN_SECONDS, lambda: "some segments are still searched forward")


def _remove_files(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink(missing_ok=True)


def writing(system: System) -> list[Process]:
    """The workers, once one of them is writing a column of the newest gallery; empty before.

    Of the newest alone, since the galleries of the tests before it may still be merged.
    """
    newest = max((system.data / "columns").iterdir(), key=lambda folder: int(folder.name))
    return list(system.workers) if list(newest.glob("*.part")) else []


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
