"""Quality over the refined part of an upgraded gallery: measured by a worker as items are embedded again."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event

from gallery import removal
from gallery.catalog import probes as probe_rows
from gallery.catalog.galleries import gallery_row
from gallery.catalog.upgrades import upgrade_row
from gallery.upgrade import lifecycle, progress, refinement
from gallery.upgrade.refinement import Refined, Refinements
from gallery.upgrade.states import State
from tests.gallery.world import GALLERY, PLAIN, Linear, World

OLD = np.array(list(itertools.product([0, 8], repeat=3)), np.float32) @ np.eye(3, 4, dtype=np.float32)
#: what the target model makes of the items, which the upgrade does not: it loses the third axis, so two and two come out alike
NEW = PLAIN(OLD)
LOSSY = Linear([row if at != 2 else [0] * 5 for at, row in enumerate(PLAIN.embedding)])
IDS = [f"i{row}" for row in range(8)]
LOST = [1, 3, 5, 7]  # those that come out as another does that is stored before them


@pytest.fixture
def world(tmp_path: Path, prepared: Path) -> Iterator[World]:
    """Eight items, a probe at the place of each, and an upgrade that is completed. Measuring may take all of the time."""
    shutil.copytree(prepared, tmp_path / "data")
    opened = World.open(tmp_path / "data", quality_share=1)
    opened.transformation("lossy", "old", "new", LOSSY)
    opened.upsert("old", IDS, OLD)
    with opened.store.catalog.transaction() as tx:
        probes = [({"old": OLD[row], "new": NEW[row]}, [IDS[row]]) for row in range(8)]
        probe_rows.replace(tx.session, gallery_row(tx.session, GALLERY).id, probes)
    yield opened
    opened.close()


@pytest.fixture
def upgrade(world: World) -> str:
    started = world.start("lossy")
    assert world.run(started) is State.COMPLETED, world.error(started)
    return started


def again(world: World, rows: Sequence[int]) -> None:
    """Embed some items again."""
    world.upsert("new", [IDS[row] for row in rows], NEW[list(rows)])


def look(world: World, upgrade: str) -> list[Mapping[str, Any]]:
    """What a worker measures; the curve after it."""
    worker = Refinements(world.store, world.galleries, world.searcher)
    for due in worker.due():
        worker.look(due)
    assert worker.due() == []
    with world.store.catalog.reading() as session:
        return list(progress.quality(upgrade_row(session, upgrade))["by_refinement"])


def test_the_curve_shows_what_each_part_was_worth(world: World, upgrade: str) -> None:
    assert [(point["fraction"], point["cmc1"]) for point in look(world, upgrade)] == [(0.0, 0.5)]
    again(world, LOST[:2])
    look(world, upgrade)
    again(world, LOST[2:])
    curve = look(world, upgrade)
    assert [(point["fraction"], point["items"], point["cmc1"]) for point in curve] == [
        (0.0, 0, 0.5),
        (0.25, 2, 0.75),
        (0.5, 4, 1.0),
    ]
    assert {point["probes"] for point in curve} == {8}
    with world.store.catalog.reading() as session:
        assert refinement.refined(session, upgrade_row(session, upgrade)) == Refined(native=4, derived=4)


def test_where_nothing_was_refined_nothing_is_measured(world: World, upgrade: str) -> None:
    worker = Refinements(world.store, world.galleries, world.searcher)
    assert worker.due() == [upgrade]
    assert worker.look(upgrade)
    world.upsert("new", ["i0"], NEW[:1])
    world.delete("i0")
    world.upsert("old", ["i0"], OLD[:1])
    assert worker.due() == [upgrade]
    assert not worker.look(upgrade)
    assert worker.due() == []


def test_it_keeps_to_its_share_of_the_time(world: World, upgrade: str, tmp_path: Path) -> None:
    look(world, upgrade)
    again(world, LOST)
    seldom = World.open(tmp_path / "data", quality_share=1e-6)
    worker = Refinements(seldom.store, seldom.galleries, seldom.searcher)
    assert worker.due() == []
    assert not worker.look(upgrade)
    assert len(look(world, upgrade)) == 2
    seldom.close()


def test_counting_keeps_to_its_share_too_where_nothing_was_refined(world: World, upgrade: str, tmp_path: Path) -> None:
    with world.store.catalog.transaction() as tx:  # which the target model cannot be asked by
        probe_rows.replace(tx.session, gallery_row(tx.session, GALLERY).id, [({"old": OLD[0]}, None)])
    seldom = World.open(tmp_path / "data", quality_share=1e-6)
    worker = Refinements(seldom.store, seldom.galleries, seldom.searcher)
    assert not worker.look(upgrade)
    world.upsert("old", ["i0"], OLD[:1])
    assert worker.due() == []
    assert Refinements(world.store, world.galleries, world.searcher).due() == [upgrade]
    seldom.close()


def test_a_refinement_goes_on_after_a_finalize(world: World, upgrade: str) -> None:
    lifecycle.finalize(world.store, upgrade)
    again(world, LOST)
    assert [(point["fraction"], point["cmc1"]) for point in look(world, upgrade)] == [(0.5, 1.0)]


@pytest.mark.parametrize("how", ["running", "rolled back", "no probes", "deleted"])
def test_only_an_upgrade_that_the_gallery_stands_on_is_looked_at(world: World, how: str) -> None:
    started = world.start("lossy")
    if how == "running":
        world.step(started)
    else:
        world.run(started)
    if how == "rolled back":
        lifecycle.rollback(world.store, started)
    if how == "no probes":
        with world.store.catalog.transaction() as tx:
            probe_rows.replace(tx.session, gallery_row(tx.session, GALLERY).id, [])
    if how == "deleted":
        removal.delete_gallery(world.store, GALLERY)
    assert Refinements(world.store, world.galleries, world.searcher).due() == []


def test_a_gallery_that_is_deleted_meanwhile_is_passed_over(world: World, upgrade: str) -> None:
    worker = Refinements(world.store, world.galleries, world.searcher)
    assert worker.due() == [upgrade]
    removal.delete_gallery(world.store, GALLERY)
    assert not worker.look(upgrade)


def test_a_worker_that_found_nothing_new_does_not_read_what_was_measured_again(world: World, upgrade: str) -> None:
    """Of a thousand galleries, that took most of a processor for as long as nothing happened."""
    again(world, LOST)
    worker = Refinements(world.store, world.galleries, world.searcher)
    while due := worker.due():
        worker.look(*due)
    statements: list[str] = []
    event.listen(world.store.catalog.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    assert worker.due() == []
    assert not [each for each in statements if "quality" in each]
