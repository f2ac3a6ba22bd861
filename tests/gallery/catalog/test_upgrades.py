"""Upgrades that are over stay for good, and cost nothing that goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sqlalchemy import insert, inspect, select

from gallery.catalog.tables import SegmentRow, UpgradeRow, UpgradeSegmentRow
from gallery.compact import merge
from gallery.upgrade import drive, lifecycle
from tests.gallery.steps import steps_of
from tests.gallery.world import OLD, SIDE, World

MANY = 100


def upsert(world: World, *ids: str) -> None:
    world.upsert("old", ids, np.ones((len(ids), OLD)), side=np.ones((len(ids), SIDE)))


def seen(world: World) -> None:
    """A write, and what a process reads to see it."""
    upsert(world, "again")
    world.galleries.refresh()


def merged(world: World) -> None:
    """Segments are merged, and those that became one are removed."""
    for each in "cd":
        upsert(world, each)
    world.compact()
    assert merge.reclaim(world.store, -1)


def looked(world: World) -> None:
    """What a worker asks, twice a second."""
    assert drive.due(world.store) == []
    assert not drive.under_way(world.store)


@pytest.mark.parametrize(("act", "most"), [(seen, 50), (merged, 50), (looked, 1)])
def test_it_costs_hardly_more_where_many_upgrades_were_cancelled(
    world: World, act: Callable[[World], Any], most: int
) -> None:
    """`most` steps for each of them."""
    upsert(world, "a", "b")
    started = world.start()
    lifecycle.cancel(world.store, started)
    world.make("other")
    world.upsert("old", ["a"], np.ones((1, OLD)), gallery="other")
    act(world)
    _, before = steps_of(world.store.catalog, lambda: act(world))
    _repeat(world, started)
    _, after = steps_of(world.store.catalog, lambda: act(world))
    assert after < before + most * MANY


def _repeat(world: World, upgrade: str) -> None:
    """Many more such upgrades, each with work for a segment of another gallery."""
    names = [each.key for each in inspect(UpgradeRow).column_attrs]
    with world.store.catalog.transaction() as tx:
        row = tx.session.get_one(UpgradeRow, upgrade)
        segment = tx.session.scalars(select(SegmentRow.id).order_by(SegmentRow.gallery_id.desc())).first()
        one = {name: getattr(row, name) for name in names} | {"started_at": row.created_at}
        many = [f"{at:026}" for at in range(MANY)]
        tx.session.execute(insert(UpgradeRow), [{**one, "id": each} for each in many])
        work = {"segment_id": segment, "position": 0, "rows": 1, "state": "done"}
        tx.session.execute(insert(UpgradeSegmentRow), [{"upgrade_id": each, **work} for each in many])
