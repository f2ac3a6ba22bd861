"""A gallery is upgraded while it is searched, written to, and robbed of its processes: the whole story, on both stacks."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
from gallery_world import GALLERY, Traffic, World, search
from system import Process, System, ok, running, wait_for

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

LEASE = "2"


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


@pytest.fixture(params=["embedded", "production"])
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stack]:
    """Embedded: one API process on SQLite with its own worker. Production: PostgreSQL, Redis, two API processes, two workers."""
    if request.param == "embedded":
        system = System(tmp_path, lease_seconds=LEASE)
        with running(system):
            system.add_api("--no-worker")
            system.add_worker()
            yield Stack(system, lambda: shutil.rmtree(system.data / "broker" / "messages", ignore_errors=True))
        return
    broker = request.getfixturevalue("redis_url")
    system = System(
        tmp_path, database_url=request.getfixturevalue("postgres_url"), broker_url=broker, lease_seconds=LEASE
    )
    with running(system):
        system.migrate()
        for _ in range(2):
            system.add_api("--no-worker")
            system.add_worker()
        with redis.Redis.from_url(broker) as client:
            yield Stack(system, client.flushall)


def test_a_gallery_is_upgraded_in_place_while_it_is_searched_and_processes_are_killed(
    stack: Stack, tmp_path: Path
) -> None:
    world = World(tmp_path / "fct.safetensors")
    world.register(stack.http)
    for start in range(0, 600, 25):
        world.upsert(stack.http if start % 2 else stack.last, [f"item-{n}" for n in range(start, start + 25)])
    wait_until_seen(stack.http, len(world.items))
    assert world.check(stack.http)["served"]["routes"]["forward"] == 600

    with Traffic(world, [str(api.http.base_url) for api in stack.system.apis]) as traffic:
        started = stack.http.post(
            "/admin/upgrades",
            json={"gallery": GALLERY, "transformation": "old-to-new", "throttle": {"items_per_second": 150}},
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

    assert traffic.failures == []
    assert traffic.searches > 20
    wait_until_seen(stack.last, len(world.items))
    for api in stack.system.apis:
        routes = world.check(api.http)["served"]["routes"]
        assert routes == {"direct": len(world.items), "forward": 0, "backward": 0, "unreachable": 0}

    payload = search(stack.http, model="new", vector=world.query()[1], k=1, include=["payload"])["hits"][0]
    assert payload["payload"] == {"name": payload["id"]}

    old, _ = world.query()
    before = search(stack.http, model="old", vector=old, k=50)["hits"]
    assert stack.http.post(f"/admin/upgrades/{upgrade}/rollback").status_code == 202
    assert search(stack.http, model="old", vector=old, k=50)["hits"] == before
    assert world.check(stack.http)["served"]["routes"]["forward"] == len(world.items)


def test_kill_9_of_the_worker_in_the_middle_of_a_segment_costs_time_and_nothing_else(
    stack: Stack, tmp_path: Path
) -> None:
    world = World(tmp_path / "fct.safetensors", hidden=2048)
    world.register(stack.http)
    world.upsert(stack.http, [f"item-{n}" for n in range(10_000)])
    upgrade = ok(stack.http.post("/admin/upgrades", json={"gallery": GALLERY, "transformation": "old-to-new"}))["id"]

    victim = wait_for(lambda: writing(stack.system), 60, lambda: str(document(stack.http, upgrade)))
    for worker in victim:
        worker.kill()
    assert progress(stack.http, upgrade)["segments_done"] == 0, "it was killed after the segment, not in its middle"
    assert state(stack.http, upgrade) == "running"
    for worker in victim:
        worker.start()

    wait_for(lambda: state(stack.http, upgrade) == "completed", 120, lambda: str(document(stack.http, upgrade)))
    assert progress(stack.http, upgrade)["items_done"] == 10_000
    wait_until_seen(stack.http, 10_000)
    answer = search(stack.http, model="new", vector=world.query()[1], k=1000)
    assert answer["served"]["routes"]["direct"] == 10_000
    assert len({hit["id"] for hit in answer["hits"]}) == 1000


@pytest.mark.parametrize("files", [1, 2, 3])
def test_kill_9_of_the_api_in_the_middle_of_an_upsert_leaves_all_of_it_or_nothing(
    stack: Stack, tmp_path: Path, files: int
) -> None:
    """The kill comes when the request has written its first, second or third file."""
    world = World(tmp_path / "fct.safetensors")
    world.register(stack.http)
    world.upsert(stack.http, ["kept-1", "kept-2"])
    columns = stack.system.data / "columns"
    there = len(list(columns.rglob("*")))
    api = stack.system.apis[0]
    unknown = [f"item-{n}" for n in range(10_000)]
    acknowledged = threading.Event()

    def write() -> None:
        try:
            world.upsert(httpx.Client(base_url=api.http.base_url, timeout=60), unknown)
            acknowledged.set()
        except httpx.TransportError:
            pass

    writer = threading.Thread(target=write)
    writer.start()
    wait_for(lambda: len(list(columns.rglob("*"))) >= there + files, 60, lambda: "the upsert wrote nothing")
    api.kill()
    writer.join()
    api.start()

    items = ok(api.http.get(f"/galleries/{GALLERY}"))["items"]
    assert items in ({10_002} if acknowledged.is_set() else {2, 10_002})
    if items == 2:
        world.upsert(api.http, unknown)
    answer = search(api.http, model="old", vector=np.zeros(16, np.float32), k=1000)
    assert sum(answer["served"]["routes"].values()) == 10_002
    assert len({hit["id"] for hit in answer["hits"]}) == 1000
    assert ok(api.http.get(f"/galleries/{GALLERY}/items/kept-1"))["payload"] == {"name": "kept-1"}


def test_a_worker_that_is_told_to_stop_finishes_or_releases_its_segment(stack: Stack, tmp_path: Path) -> None:
    world = World(tmp_path / "fct.safetensors")
    world.register(stack.http)
    for start in range(0, 200, 20):
        world.upsert(stack.http, [f"item-{n}" for n in range(start, start + 20)])
    throttle = {"items_per_second": 100}
    upgrade = ok(
        stack.http.post(
            "/admin/upgrades", json={"gallery": GALLERY, "transformation": "old-to-new", "throttle": throttle}
        )
    )["id"]
    wait_for(lambda: progress(stack.http, upgrade)["segments_done"] >= 1, 60, lambda: "no segment was done")

    assert [worker.stop() for worker in stack.system.workers] == [0] * len(stack.system.workers)
    done = progress(stack.http, upgrade)["segments_done"]
    assert state(stack.http, upgrade) == "running"
    for worker in stack.system.workers:
        worker.start()
    wait_for(lambda: state(stack.http, upgrade) == "completed", 60, lambda: str(document(stack.http, upgrade)))
    assert progress(stack.http, upgrade)["segments_done"] == 10 > done
    wait_until_seen(stack.http, 200)
    world.check(stack.http)


def test_serve_runs_a_worker_of_its_own_and_replaces_it_when_it_dies(tmp_path: Path) -> None:
    with running(System(tmp_path, lease_seconds=LEASE)) as system:
        api = system.add_api()
        world = World(tmp_path / "fct.safetensors")
        world.register(api.http)
        world.upsert(api.http, [f"item-{n}" for n in range(50)])
        child = wait_for(lambda: children(api.popen.pid), 30, lambda: "no worker was started")
        for pid in child:
            os.kill(pid, signal.SIGKILL)
        upgrade = ok(api.http.post("/admin/upgrades", json={"gallery": GALLERY, "target_model": "new"}))["id"]
        wait_for(lambda: state(api.http, upgrade) == "completed", 60, lambda: str(document(api.http, upgrade)))
        world.check(api.http)
        workers = children(api.popen.pid)
        assert workers
        assert api.stop() == 0
        assert not any(alive(pid) for pid in workers), "the worker outlived its parent"


def document(http: httpx.Client, upgrade: str) -> dict[str, Any]:
    found: dict[str, Any] = ok(http.get(f"/admin/upgrades/{upgrade}"))
    return found


def state(http: httpx.Client, upgrade: str) -> str:
    return str(document(http, upgrade)["state"])


def progress(http: httpx.Client, upgrade: str) -> dict[str, Any]:
    found: dict[str, Any] = document(http, upgrade)["progress"]
    return found


def wait_until_seen(http: httpx.Client, items: int) -> None:
    """A write at one process is seen by the others within a second."""

    def seen() -> bool:
        answer = search(http, model="old", vector=np.zeros(16, np.float32), k=1)
        return sum(answer["served"]["routes"].values()) == items

    wait_for(seen, 1.5, lambda: f"{items} items are not seen")


def writing(system: System) -> list[Process]:
    """The workers, once one of them is writing a column; empty before."""
    parts = list((system.data / "columns").rglob("*.part"))
    return list(system.workers) if parts else []


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task")
    if not path.exists():
        return []
    return [int(child) for task in path.iterdir() for child in (task / "children").read_text().split()]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
