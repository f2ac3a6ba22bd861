"""The queue is only there to hurry workers: without it, or where it refuses, they work all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.forks import Nursery
from tests.acceptance.gallery_world import World
from tests.acceptance.system import System, ok, wait_for
from tests.faults.servers import Redis

pytestmark = pytest.mark.acceptance


def killed(redis: Redis) -> None:
    redis.kill()


def no_master_any_more(redis: Redis) -> None:
    """As after a failover: who waits for a message is refused, and so is who brings one."""
    redis.client.execute_command("REPLICAOF", "127.0.0.1", "1")


@pytest.fixture
def redis(tmp_path: Path, redis_server: str) -> Iterator[Redis]:
    """One that may be harmed."""
    found = Redis(tmp_path)
    yield found
    found.client.close()
    found.kill()


@pytest.mark.parametrize("harm", [killed, no_master_any_more])
def test_an_upgrade_completes_while_the_queue_is(
    tmp_path: Path, nursery: Nursery, redis: Redis, harm: Callable[[Redis], None]
) -> None:
    system = System(tmp_path, broker_url=redis.url, spawn=nursery.spawn)
    world = World(tmp_path / "artifact.safetensors", "photos")
    api = system.add_api("--no-worker")
    world.register(api.http)
    world.upsert(api.http, ["a", "b"])
    worker = system.add_worker()
    wait_for(lambda: b'"worker_started"' in worker.log.read_bytes(), 60, worker.log.read_text)
    wait_for(lambda: redis.client.client_list(_type="normal")[1:], 60, lambda: "the worker does not connect")
    harm(redis)
    started = ok(api.http.post("/admin/upgrades", json={"gallery": "photos", "transformation": world.transformation}))
    path = f"/admin/upgrades/{started['id']}"
    wait_for(lambda: ok(api.http.get(path))["state"] == "completed", 60, worker.log.read_text)
    assert worker.stop() == 0
    assert api.stop() == 0
