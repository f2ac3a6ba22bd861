"""What an upgrade stands on may be worse than it looks: a clock that is set back, a column that is not what was written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select

from gallery import faults
from gallery.catalog import latencies
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ColumnRow, SegmentRow
from gallery.upgrade import drive, lifecycle, segment
from gallery.upgrade.states import State
from tests.gallery.world import WITH_SIDE, World

VECTORS, SIDE = np.arange(8.0).reshape(2, 4), np.ones((2, 2))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    opened = World.open(tmp_path / "data", lease_seconds=600).prepare(("forward", "old", "new", WITH_SIDE))
    opened.upsert("old", ["a", "b"], VECTORS, side=SIDE)
    yield opened
    faults.arm(None)
    opened.close()


def test_a_lease_of_the_dead_ends_although_the_clock_was_set_back(world: World) -> None:
    upgrade = world.start()
    world.step(upgrade)
    held = segment.lease(world.store, upgrade, "dead")
    assert held is not None
    assert segment.lease(world.store, upgrade, "other") is None
    faults.arm("clock:-3600")
    assert drive.due(world.store) == [upgrade]
    taken = segment.lease(world.store, upgrade, "other")
    assert taken is not None
    assert taken.fence == held.fence + 1
    assert segment.lease(world.store, upgrade, "third") is None


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_worker_on_a_host_whose_clock_differs_takes_nothing_from_another(
    tmp_path: Path, postgres_url: str, seconds: int
) -> None:
    """Each would take away what the other holds, until a segment is set aside because its workers had died."""
    world = World.open(tmp_path / "data", postgres_url).prepare(("forward", "old", "new", WITH_SIDE))
    world.upsert("old", ["a", "b"], VECTORS, side=SIDE)
    upgrade = world.start()
    world.step(upgrade)
    assert segment.lease(world.store, upgrade, "holder") is not None
    faults.arm(f"clock:{seconds}")
    try:
        assert drive.due(world.store) == []
        assert segment.lease(world.store, upgrade, "other") is None
    finally:
        faults.arm(None)
        world.close()


@pytest.mark.parametrize(
    ("throttle", "starts_anew"),
    [({"items_per_second": 0.01}, 100), ({"duty_cycle": 1e-6}, 0)],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_a_throttle_waits_no_longer_because_the_clock_was_set_back(
    world: World, throttle: dict[str, float], starts_anew: int
) -> None:
    world.upsert("old", ["c"], VECTORS[:1], side=SIDE[:1])
    upgrade = world.start(throttle=throttle)
    world.step(upgrade)
    until_leased(world, upgrade, 200)
    assert not world.step(upgrade)
    assert drive.due(world.store) == []
    faults.arm("clock:-3600")
    assert drive.due(world.store) == [upgrade]
    until_leased(world, upgrade, starts_anew - 3600)
    with world.store.catalog.reading() as session:
        assert upgrade_rows.counts(session, upgrade).segments == {"done": 2}


def until_leased(world: World, upgrade: str, seconds: int) -> None:
    """A segment is done by then, at the latest."""
    if not world.step(upgrade):
        faults.arm(f"clock:{seconds}")
        assert world.step(upgrade)


def test_searches_that_were_slow_before_the_clock_was_set_back_hold_nothing_back(world: World) -> None:
    upgrade = world.start(throttle={"max_search_p99_ms": 5})
    world.step(upgrade)
    with world.store.catalog.transaction() as tx:
        latencies.publish(tx.session, "of an API process that died", {1: 80.0})
    assert not world.step(upgrade)
    faults.arm("clock:-3600")
    assert world.step(upgrade)


@pytest.mark.parametrize("what", ["embeddings", "side-information"])
def test_nothing_is_derived_from_damaged_bytes(world: World, what: str) -> None:
    with world.store.catalog.reading() as session:
        columns, sides = session.scalars(select(ColumnRow.file)), session.scalars(select(SegmentRow.side_file))
        name = (columns if what == "embeddings" else sides).one()
    assert name is not None
    path = world.store.files.path(name)
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    upgrade = world.start()
    assert world.run(upgrade) == State.FAILED
    with world.store.catalog.reading() as session:
        (failure,) = upgrade_rows.failures(session, upgrade)
        assert name in (failure.error or "")
        assert session.scalars(select(ColumnRow).where(ColumnRow.origin == "derived")).all() == []
    path.write_bytes(whole)
    lifecycle.retry(world.store, upgrade)
    assert world.run(upgrade) == State.COMPLETED
