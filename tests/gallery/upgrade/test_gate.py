"""Quality is measured with probes, by the search that serves, before, during and after; a gate compares it with a limit."""

from __future__ import annotations

import itertools

import numpy as np

from gallery.catalog.galleries import gallery_row
from gallery.catalog.upgrades import upgrade_row
from gallery.upgrade import gate
from gallery.upgrade.states import State
from tests.gallery.world import GALLERY, WITH_SIDE, World

# Corners of a cube: whole numbers, so that every score is exact, and no two items alike.
OLD = np.array(list(itertools.product([0, 8], repeat=3)), np.float32) @ np.eye(3, 4, dtype=np.float32)
SIDE = np.zeros((8, 2), np.float32)
IDS = [f"i{row}" for row in range(8)]


def fill(world: World, *, relevant: bool = True) -> None:
    """Items, and for each a probe at its place in both models, whose relevant item is itself; half are told a wrong one."""
    world.upsert("old", IDS, OLD, side=SIDE)
    new = WITH_SIDE(OLD, SIDE)
    with world.store.catalog.transaction() as tx:
        probes = [
            (
                {"old": OLD[row], "new": new[row]},
                [IDS[row] if row % 2 else IDS[(row + 1) % 8]] if relevant else None,
            )
            for row in range(8)
        ]
        gate.put_probes(tx.session, gallery_row(tx.session, GALLERY).id, probes)


def test_quality_before_expected_and_now_is_what_the_probes_say(each_world: World) -> None:
    fill(each_world)
    upgrade = each_world.start()
    assert each_world.run(upgrade) is State.COMPLETED
    with each_world.store.catalog.reading() as session:
        quality = upgrade_row(session, upgrade).quality
    assert {name: measured["cmc1"] for name, measured in quality.items()} == {
        "before": 0.5,
        "now": 0.5,
        "expected_after": 0.5,
    }
    assert quality["now"]["recall_at_10"] == 1.0
    assert quality["now"]["probes"] == 8


def test_an_upgrade_that_would_miss_its_gate_does_not_start_and_says_by_how_much(world: World) -> None:
    fill(world)
    upgrade = world.start(gate={"min_cmc1": 0.75})
    before = world.version()
    assert world.run(upgrade) is State.FAILED
    assert "cmc1 of at least 0.75, and 0.5000 is expected after the upgrade (0.2500 short)" in (
        world.error(upgrade) or ""
    )
    assert world.version() - before <= 1  # the step itself; no segment was touched
    assert world.search("old", OLD[:1]).coverage.direct == 8


def test_an_upgrade_that_meets_its_gate_goes_on(world: World) -> None:
    fill(world)
    upgrade = world.start(gate={"min_cmc1": 0.5, "min_recall_at_10": 1.0})
    assert world.run(upgrade) is State.COMPLETED, world.error(upgrade)


def test_a_gate_without_probes_that_can_judge_is_a_reason_not_to_start(world: World) -> None:
    fill(world, relevant=False)
    upgrade = world.start(gate={"min_cmc1": 0.1})
    assert world.run(upgrade) is State.FAILED
    assert "no probes with relevant ids" in (world.error(upgrade) or "")
