"""A gallery among others is as if it were alone, although all are in the same tables."""

from __future__ import annotations

import re
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
PASSING = {"took_ms", "request_id", "report"}
MADE_UP = re.compile("[0-9A-Z]{26}")


def lasting(document: Any) -> Any:
    """A document without moments, durations, rates, and ids that the service makes up."""
    if isinstance(document, dict):
        return {
            name: lasting(value)
            for name, value in document.items()
            if name not in PASSING and not name.endswith(("_at", "_seconds", "_per_second", "_since"))
        }
    if isinstance(document, list):
        return [lasting(each) for each in document]
    return "made up" if isinstance(document, str) and MADE_UP.fullmatch(document) else document


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
            [[each["action"], each["detail"]] for each in events],
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


@pytest.mark.parametrize("ahead", [0, 3])
def test_what_is_told_of_a_gallery_does_not_depend_on_what_becomes_of_its_neighbour(tmp_path: Path, ahead: int) -> None:
    both = {GALLERY: UNITS, NEIGHBOUR: UNITS[::-1]}
    alone: dict[str, list[Any]] = {}
    for gallery, units in both.items():
        with opened(tmp_path / gallery) as world:
            world.models()
            alone[gallery] = [(step, seen(world, gallery)) for step in life(world, gallery, units)]
    with opened(tmp_path / "both") as world:
        world.models()
        first, second = (life(world, gallery, units) for gallery, units in both.items())
        for _ in range(ahead):
            next(second)
        last = len(alone[NEIGHBOUR]) - 1
        for at, step in enumerate(first):
            next(second, None)
            assert (step, seen(world, GALLERY)) == alone[GALLERY][at]
            assert seen(world, NEIGHBOUR) == alone[NEIGHBOUR][min(at + ahead, last)][1]
        world.client.delete(f"/galleries/{GALLERY}").raise_for_status()
        assert seen(world, NEIGHBOUR) == alone[NEIGHBOUR][last][1]
