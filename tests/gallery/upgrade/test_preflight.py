"""A dry run tells everything that an upgrade will take and whatever stands against it, and changes nothing."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
from sqlalchemy import MetaData

from gallery import removal
from gallery.catalog.upgrades import upgrade_row
from gallery.transforms import artifact_file
from gallery.upgrade import lifecycle, memory
from gallery.upgrade.progress import progress
from gallery.upgrade.states import State
from tests.gallery.crash import stored_files
from tests.gallery.world import GALLERY, NEW, World

OLD = np.arange(24, dtype=np.float32).reshape(6, 4) + 1
IDS = [f"i{row}" for row in range(6)]
#: what is the upgrade's own
OWN = {"upgrades", "upgrade_segments", "events", "sqlite_sequence"}


def catalog(world: World) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table but the upgrade's own."""
    metadata = MetaData()
    metadata.reflect(world.store.catalog.engine)
    with world.store.catalog.engine.connect() as connection:
        return {
            table.name: sorted(map(tuple, connection.execute(table.select())), key=repr)
            for table in metadata.sorted_tables
            if table.name not in OWN
        }


def reported(world: World, upgrade: str) -> dict[str, Any]:
    """The report of an upgrade, its checks by name."""
    with world.store.catalog.reading() as session:
        report = upgrade_row(session, upgrade).report
    return {**report, "checks": {each["check"]: each for each in report["checks"]}}


def test_a_dry_run_reports_all_of_it_and_changes_no_byte(each_world: World) -> None:
    world = each_world
    world.upsert("old", IDS, OLD, side=OLD[:, :2])
    before, files = catalog(world), stored_files(world.store.files.root)
    upgrade = world.start(dry_run=True, score_thresholds=[0.5], throttle={"items_per_second": 2})
    assert world.run(upgrade) is State.COMPLETED
    assert catalog(world) == before
    assert stored_files(world.store.files.root) == files
    report = reported(world, upgrade)
    assert all(check["passed"] and check["detail"] for check in report["checks"].values())
    names = ["artifact", "transformation", "known_answers", "side_information", "disk", "memory", "quality", "order"]
    assert list(report["checks"]) == names
    assert (report["items"], report["items_without_side_information"]) == (6, 0)
    assert report["estimated_seconds"] == 3  # as it is throttled
    assert report["bytes_needed"] == int(6 * 5 * 4 * 1.1)
    assert 0 < report["memory_needed"] < report["memory_free"]
    assert report["known_answers"] == []
    assert report["score_thresholds"][0]["reason"]


@pytest.mark.parametrize(("policy", "state"), [("fail", "failed"), ("zeros", "completed"), ("skip", "completed")])
def test_items_without_side_information_are_counted_with_what_each_policy_would_do(
    world: World, policy: Any, state: str
) -> None:
    world.upsert("old", IDS[:4], OLD[:4], side=OLD[:4, :2])
    world.upsert("old", IDS[4:], OLD[4:])
    upgrade = world.start(dry_run=True, on_missing_side_information=policy)
    assert world.run(upgrade) == state
    report = reported(world, upgrade)
    assert report["items_without_side_information"] == 2
    assert report["on_missing_side_information"]["fail"] == "refuses to start"
    assert report["on_missing_side_information"]["zeros"] == "maps 2 items with zeros in its place"
    assert "leaves 2 items as they are" in report["on_missing_side_information"]["skip"]
    assert report["checks"]["side_information"]["passed"] is (policy != "fail")
    assert report["checks"]["disk"]["passed"]  # whatever another check says


def test_a_disk_and_a_memory_that_are_too_small_are_told_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are real limits of the machine, which a test can only make smaller."""
    world.upsert("old", IDS, OLD, side=OLD[:, :2])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    monkeypatch.setattr(memory, "free", lambda: 1000)
    upgrade = world.start(dry_run=True)
    assert world.run(upgrade) is State.FAILED
    said = world.error(upgrade) or ""
    assert "need about 132 bytes, and the disk has 10 free" in said
    assert "1000 are free" in said
    report = reported(world, upgrade)
    assert (report["bytes_needed"], report["bytes_free"], report["memory_free"]) == (132, 10, 1000)
    assert report["checks"]["quality"]["passed"]


def test_where_the_artifact_is_damaged_nothing_is_asked_of_it(world: World) -> None:
    world.upsert("old", IDS, OLD, side=OLD[:, :2])
    upgrade = world.start(dry_run=True)
    with world.store.catalog.reading() as session:
        sha256 = upgrade_row(session, upgrade).artifact
    world.store.files.path(artifact_file(sha256)).write_bytes(b"{}")
    assert world.run(upgrade) is State.FAILED
    report = reported(world, upgrade)
    assert "SHA-256" in report["checks"]["artifact"]["detail"]
    assert list(report["checks"]) == ["artifact", "side_information", "disk", "memory"]


def test_memory_grows_with_the_widest_layer_and_with_the_largest_indexes() -> None:
    flat: dict[str, Any] = {"block": 8192, "dimensions": (128, None, 128), "indexed_rows": 0, "segments": 1}
    narrow = memory.needed(**flat, architecture={"hidden": 256})
    wide = memory.needed(**flat, architecture={"hidden": 2048})
    assert wide - narrow == 2 * 8192 * 2 * (2048 - 256) * 4, "of the segment that is under way, and of one that ends"
    layered = memory.needed(**flat, architecture={"layers": [{"width": 2048}, {"width": 64}]})
    assert layered == wide
    indexed = memory.needed(**{**flat, "indexed_rows": 1_000_000}, architecture={"hidden": 2048})
    assert indexed - wide // 2 > 1_000_000 * 128 * 4
    several = memory.needed(**{**flat, "indexed_rows": 1_000_000, "segments": 3}, architecture={"hidden": 2048})
    assert several - wide // 2 == 3 * (indexed - wide // 2)


def test_what_is_free_is_known_on_this_machine_or_said_to_be_unknown() -> None:
    free = memory.free()
    assert free is None or 0 <= free < 1 << 50


def test_the_end_of_a_dry_run_changes_no_gallery_and_asks_nothing_of_its_items(each_world: World) -> None:
    world = each_world
    world.upsert("old", ["a"], OLD[:1], side=np.ones((1, 2)))
    upgrade = world.start()
    world.upsert("new", ["n"], np.ones((1, NEW)))
    assert world.run(upgrade) is State.COMPLETED
    lifecycle.rollback(world.store, upgrade, accept_unreachable=True)
    dry, version = world.start(dry_run=True), world.version()
    assert lifecycle.cancel(world.store, dry).changed
    assert (world.state(dry), world.version()) == (State.CANCELLED, version)


def test_how_far_a_dry_run_would_have_come_is_kept_when_it_fails(world: World) -> None:
    world.upsert("old", ["a", "b"], OLD[:2])
    dry = world.start(dry_run=True)
    assert world.run(dry) is State.FAILED
    removal.delete_gallery(world.store, GALLERY)
    with world.store.catalog.reading() as session:
        assert progress(session, upgrade_row(session, dry)).items_total == 2
