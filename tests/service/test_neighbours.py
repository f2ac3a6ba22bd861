"""A gallery among others is as if it were alone, although all are in the same tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.service.world import GALLERY, NEW, UNITS, World, opened
from workers.settings import WorkerSettings
from workers.tasks import Worker

NEIGHBOUR = "neighbour"
#: fields that differ from one run to the next
PASSING = {"id", "at", "took_ms", "active_upgrade", "upgrade", "upgrade_id", "request_id", "report"}


def lasting(document: Any) -> Any:
    """A document without moments, durations, rates, and ids that are made up."""
    if isinstance(document, dict):
        return {
            name: lasting(value)
            for name, value in document.items()
            if name not in PASSING and not name.endswith(("_at", "_ms", "_seconds", "_per_second", "_since"))
        }
    return [lasting(each) for each in document] if isinstance(document, list) else document


def seen(world: World, gallery: str) -> Any:
    """All that clients and operators are told of a gallery."""
    queries = {"model": "old", "queries": UNITS.tolist(), "k": 20, "include": ["payload"], "allow_partial": True}
    upgrades = [each for each in world.get("/admin/upgrades")["upgrades"] if each["gallery"] == gallery]
    lines = world.client.get("/metrics").text.splitlines()
    events = world.get("/admin/events", params={"gallery": gallery})["events"]
    return lasting(
        [
            world.get(f"/galleries/{gallery}"),
            [world.get(f"/galleries/{gallery}/items/item-{at}", status=(200, 404)) for at in range(4)],
            world.post(f"/galleries/{gallery}/search/batch", queries, status=(200, 409)),
            world.post(f"/galleries/{gallery}/search/batch", {**queries, "filter": {"even": True}}, status=(200, 409)),
            upgrades,
            [line for line in lines if f'gallery="{gallery}"' in line],
            events,
        ]
    )


def life(world: World, gallery: str, units: Any) -> Iterator[str]:
    """What may happen to a gallery; stops after each step, and says what it was."""
    items = f"/galleries/{gallery}/items"

    def write(model: str, at: int, vector: Any) -> None:
        item = {"id": f"item-{at}", "embedding": vector.tolist(), "payload": {"even": bool(vector.argmax() % 2)}}
        world.post(items, {"model": model, "items": [item]})

    def upgrade(**how: Any) -> str:
        body = {"gallery": gallery, "transformation": "old-to-new", **how}
        started: str = world.post("/admin/upgrades", body)["id"]
        return started

    world.post("/galleries", {"name": gallery, "model": "old"})
    for at, unit in enumerate(units):
        write("old", at, unit)
    write("old", 1, units[1])
    yield "written"
    world.post(f"{items}/delete", {"ids": ["item-2", "nobody"]})
    probes = [{"vectors": {"old": unit.tolist()}, "relevant": ["item-0"]} for unit in units[:2]]
    assert world.client.put(f"/galleries/{gallery}/probes", json={"probes": probes}).status_code == 200
    yield "probed"
    first = upgrade()
    world.work(until="running")
    yield "begun"
    world.verb(first, "cancel")
    yield "cancelled"
    second = upgrade()
    world.work()
    yield "upgraded"
    write("new", 3, np.eye(NEW)[0])
    yield "mixed"
    world.verb(second, "rollback", {"accept_unreachable": True})
    yield "rolled back"
    third = upgrade()
    world.work()
    world.post(f"/admin/galleries/{gallery}/compact")
    Worker(world.store, WorkerSettings(compact_segments=0)).work()
    world.app.state.process.galleries.refresh()
    yield "merged"
    world.verb(third, "finalize")
    yield "finalized"


@pytest.mark.parametrize("until", ["probed", "mixed", "finalized"])
def test_a_gallery_is_as_if_it_were_alone_whatever_became_of_its_neighbour(tmp_path: Path, until: str) -> None:
    with opened(tmp_path / "alone") as world:
        world.models()
        alone = {step: seen(world, GALLERY) for step in life(world, GALLERY, UNITS)}
    with opened(tmp_path / "beside") as world:
        world.models()
        for step in life(world, NEIGHBOUR, UNITS[::-1]):
            if step == until:
                break
        beside = seen(world, NEIGHBOUR)
        for step in life(world, GALLERY, UNITS):
            assert (step, seen(world, GALLERY)) == (step, alone[step])
            assert (step, seen(world, NEIGHBOUR)) == (step, beside)
        world.client.delete(f"/galleries/{GALLERY}").raise_for_status()
        assert seen(world, NEIGHBOUR) == beside
