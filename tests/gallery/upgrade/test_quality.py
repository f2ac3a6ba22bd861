"""Quality is measured with probes, by the search that serves, before, during and after; a gate compares it with limits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery import errors
from gallery.catalog import probes as probe_rows
from gallery.catalog.galleries import gallery_row
from gallery.catalog.tables import UpgradeRow
from gallery.catalog.upgrades import upgrade_row
from gallery.upgrade import drive, gate, lifecycle, live, moves, quality
from gallery.upgrade.progress import Condition, conditions
from gallery.upgrade.states import State
from tests.gallery.world import BACKWARD, GALLERY, PLAIN, WITH_SIDE, Linear, World

# Corners of a cube: whole numbers, so that every score is exact, and no two items alike.
OLD = np.array(list(itertools.product([0, 8], repeat=3)), np.float32) @ np.eye(3, 4, dtype=np.float32)
SIDE = np.zeros((8, 2), np.float32)
# Each item is 1 away from its probe in the target model, and 0 in the source model.
NEW = WITH_SIDE(OLD, SIDE) + np.array([0, 0, 0, 0, 1], np.float32)
IDS = [f"i{row}" for row in range(8)]
ITSELF = [[item] for item in IDS]
HALF = [[IDS[row] if row % 2 else IDS[(row + 1) % 8]] for row in range(8)]


def probe(world: World, relevant: Sequence[Sequence[str] | None], *, models: Sequence[str] = ("old", "new")) -> None:
    """A probe at the place of each item, in each of the models."""
    vectors = {"old": OLD, "new": NEW}
    probes = [({name: vectors[name][row] for name in models}, relevant[row]) for row in range(8)]
    with world.store.catalog.transaction() as tx:
        probe_rows.replace(tx.session, gallery_row(tx.session, GALLERY).id, probes)


def fill(world: World, relevant: Sequence[Sequence[str] | None] = ITSELF, *, segments: int = 1) -> None:
    """Items in so many segments, and a probe at the place of each."""
    for rows in np.array_split(np.arange(8), segments):
        world.upsert("old", [IDS[row] for row in rows], OLD[rows], side=SIDE[rows])
    probe(world, relevant)


def intrude(world: World) -> None:
    """Items come natively in the target model that are nearer to each probe than its own item."""
    world.upsert("new", [f"x{row}" for row in range(8)], NEW)


def read(world: World, upgrade: str) -> UpgradeRow:
    """The row of an upgrade."""
    with world.store.catalog.reading() as session:
        return upgrade_row(session, upgrade)


def told(world: World, upgrade: str) -> dict[str, Condition]:
    """The conditions of an upgrade, by type."""
    with world.store.catalog.reading() as session:
        return {each.type: each for each in conditions(session, upgrade_row(session, upgrade))}


@pytest.fixture
def measured_often(tmp_path: Path, world: World) -> World:
    """A worker that measures quality whenever there is progress."""
    return World.open(tmp_path / "data", quality_share=1)


def test_quality_before_expected_and_now_is_what_the_probes_say(each_world: World) -> None:
    fill(each_world, HALF)
    upgrade = each_world.start()
    assert each_world.run(upgrade) is State.COMPLETED
    found = read(each_world, upgrade).quality
    for name in ("before", "now", "expected_after"):
        assert found[name]["cmc1"] == 0.5
        assert found[name]["recall_at_10"] == 1.0
        assert found[name]["map"] == pytest.approx(np.mean([1, 1 / 2] * 4), abs=0.2)
        assert (found[name]["probes"], found[name]["judged"]) == (8, 8)
    assert found["now"]["negative_flips"] == 0
    assert found["now"]["overlap_at_10"] == 1.0
    assert found["before"]["overlap_at_10"] is None


def test_probes_without_known_relevance_tell_what_stays_of_the_answers(world: World) -> None:
    fill(world, [None] * 8)
    for row in range(12):
        world.upsert("old", [f"far-{row}"], [[90, 90, 90, row]], side=[[0, 0]])
    upgrade = world.start(gate={"min_overlap_at_10": 0.5})
    assert world.run(upgrade) is State.COMPLETED, world.error(upgrade)
    found = read(world, upgrade).quality["expected_after"]
    assert found["overlap_at_10"] == 1.0
    assert (found["probes"], found["judged"], found["cmc1"]) == (8, 0, None)


def test_probes_of_one_model_alone_measure_that_model(world_both_ways: World) -> None:
    fill(world_both_ways)
    probe(world_both_ways, ITSELF, models=["new"])
    upgrade = world_both_ways.start()
    assert world_both_ways.run(upgrade) is State.COMPLETED
    found = read(world_both_ways, upgrade).quality
    assert found["before"] is None
    assert found["expected_after"]["cmc1"] == 1.0
    assert found["expected_after"]["negative_flips"] is None


def test_items_that_are_skipped_are_missed_by_what_is_expected(world: World) -> None:
    world.upsert("old", IDS[:4], OLD[:4], side=SIDE[:4])
    world.upsert("old", IDS[4:], OLD[4:])
    probe(world, ITSELF)
    upgrade = world.start(on_missing_side_information="skip", gate={"max_cmc1_drop": 0.4})
    assert world.run(upgrade) is State.FAILED
    assert "a drop of 0.5000" in (world.error(upgrade) or "")
    assert read(world, upgrade).quality["expected_after"]["negative_flips"] == 4


def test_a_dry_run_without_a_gate_says_what_would_be_worse(world: World) -> None:
    world.upsert("old", IDS[:4], OLD[:4], side=SIDE[:4])
    world.upsert("old", IDS[4:], OLD[4:])
    probe(world, ITSELF)
    dry = world.start(on_missing_side_information="skip", dry_run=True)
    assert world.run(dry) is State.COMPLETED
    (said,) = (each["detail"] for each in read(world, dry).report["checks"] if each["check"] == "quality")
    assert said == (
        "measured with 8 probes; no limit was asked for; cmc1 falls from 1.000 to 0.500; recall_at_10 falls from 1.000 to 0.500; "
        "map falls from 1.000 to 0.500"
    )


def test_what_is_expected_is_what_the_upgraded_gallery_finds_also_where_the_source_model_would_not_propose_it(
    world: World,
) -> None:
    """Both models together find the right item first; the target model alone finds one that the source model holds for far."""
    near = np.arange(1200, dtype=np.float32)[:, None] * np.eye(1, 4, dtype=np.float32)
    far = np.array([[5000, 0, 0, 0]], np.float32)
    world.upsert("old", ["far", *(f"n{row}" for row in range(1200))], np.vstack([far, near]), side=np.zeros((1201, 2)))
    asked = {"old": near[0], "new": WITH_SIDE(far * 0.8, SIDE[:1])[0]}
    with world.store.catalog.transaction() as tx:
        probe_rows.replace(tx.session, gallery_row(tx.session, GALLERY).id, [(asked, ["n999"])])
    dry = world.start(dry_run=True, gate={"min_cmc1": 1.0})
    assert world.run(dry) is State.FAILED
    upgrade = world.start()
    assert world.run(upgrade) is State.COMPLETED
    assert read(world, dry).quality["expected_after"] == read(world, upgrade).quality["now"]


# --- the gate, before the first segment ---------------------------------------------------------------------------------


def test_an_upgrade_that_would_miss_its_gate_does_not_start_and_says_by_how_much(world: World) -> None:
    fill(world, HALF)
    upgrade = world.start(gate={"min_cmc1": 0.75})
    before = world.version()
    assert world.run(upgrade) is State.FAILED
    assert "cmc1 of at least 0.75, and 0.5000 is expected after the upgrade (0.2500 short)" in (
        world.error(upgrade) or ""
    )
    assert world.version() - before <= 1  # the step itself; no segment was touched
    assert world.search("old", OLD[:1]).coverage.direct == 8
    assert told(world, upgrade)["failed"].reason == "validation_failed"
    lifecycle.resume(world.store, upgrade)  # it is judged again, for it never began
    assert world.run(upgrade) is State.FAILED


def test_an_upgrade_that_meets_its_gate_goes_on(world: World) -> None:
    fill(world, HALF)
    limits = {"min_cmc1": 0.5, "min_recall_at_10": 1.0, "max_negative_flips": 0, "max_map_drop": 0.0}
    upgrade = world.start(gate=limits)
    assert world.run(upgrade) is State.COMPLETED, world.error(upgrade)


def test_a_gate_without_probes_that_can_judge_is_a_reason_not_to_start(world: World) -> None:
    fill(world, [None] * 8)
    upgrade = world.start(gate={"min_cmc1": 0.1})
    assert world.run(upgrade) is State.FAILED
    assert "no probes with relevant ids" in (world.error(upgrade) or "")


@pytest.mark.parametrize("cutover", ["progressive", "manual"])
def test_a_drop_is_not_told_from_one_probe_of_the_source_and_another_of_the_target(
    world_both_ways: World, cutover: str
) -> None:
    """The backward transformation lets the target be asked by its own probes at any time."""
    world = world_both_ways
    fill(world, segments=2)
    upgrade = world.start(gate={"max_cmc1_drop": 1.0}, cutover=cutover)
    alone = [({"old": OLD[0]}, ["i0"]), ({"new": NEW[1]}, ["i1"])]
    with world.store.catalog.transaction() as tx:
        probe_rows.replace(tx.session, gallery_row(tx.session, GALLERY).id, alone)
    assert world.run(upgrade) is State.FAILED
    assert "no probes with relevant ids and vectors of both models" in (world.error(upgrade) or "")
    found = read(world, upgrade).quality
    assert (found["before"]["cmc1"], found["expected_after"]["cmc1"]) == (1.0, 1.0)


def test_a_drop_is_not_told_from_probes_that_are_unrelated_since_the_upgrade_began(measured_often: World) -> None:
    world = measured_often
    world.transformation("backward", "new", "old", BACKWARD)
    fill(world, segments=4)
    upgrade = world.start(gate={"max_cmc1_drop": 1.0})
    world.step(upgrade)
    alone = [({"old": OLD[0]}, ["i0"]), ({"new": NEW[1]}, ["i1"])]
    with world.store.catalog.transaction() as tx:
        probe_rows.replace(tx.session, gallery_row(tx.session, GALLERY).id, alone)
    world.step(upgrade)
    assert world.state(upgrade) is State.PAUSED
    assert "no probes with relevant ids and vectors of both models" in told(world, upgrade)["gate_closed"].detail


# --- the gate, while it runs --------------------------------------------------------------------------------------------


def test_quality_over_progress_is_kept_while_an_upgrade_runs(measured_often: World) -> None:
    fill(measured_often, segments=4)
    upgrade = measured_often.start()
    assert measured_often.run(upgrade) is State.COMPLETED
    points = read(measured_often, upgrade).quality["by_progress"]
    assert [point["fraction"] for point in points] == [0, 0.25, 0.5, 0.75, 1]
    assert {point["cmc1"] for point in points} == {1.0}


def test_an_upgrade_whose_quality_falls_below_its_gate_pauses_and_a_person_decides(measured_often: World) -> None:
    world = measured_often
    fill(world, segments=4)
    upgrade = world.start(gate={"max_negative_flips": 3})
    world.step(upgrade)
    world.step(upgrade)
    assert (world.state(upgrade), told(world, upgrade)) == (State.RUNNING, {})
    intrude(world)
    world.step(upgrade)
    assert world.state(upgrade) is State.PAUSED
    found = told(world, upgrade)
    assert found["paused"].reason == "gate_closed"
    assert found["gate_closed"].reason == "max_negative_flips"
    assert "negative_flips of at most 3, and 8 is measured now (5 too many)" in found["gate_closed"].detail
    quality_now = read(world, upgrade).quality
    assert (quality_now["before"]["cmc1"], quality_now["now"]["cmc1"]) == (1.0, 0.0)

    lifecycle.resume(world.store, upgrade)
    world.step(upgrade)
    assert world.state(upgrade) is State.RUNNING
    assert told(world, upgrade).keys() == {"gate_waived"}
    assert world.run(upgrade) is State.COMPLETED
    assert told(world, upgrade) == {}


def test_a_pause_that_a_person_asked_for_waives_no_gate(measured_often: World) -> None:
    world = measured_often
    fill(world, segments=4)
    upgrade = world.start(gate={"min_cmc1": 0.9})
    world.step(upgrade)
    lifecycle.pause(world.store, upgrade)
    assert told(world, upgrade)["paused"].reason == "requested"
    lifecycle.resume(world.store, upgrade)
    intrude(world)
    world.step(upgrade)
    assert world.state(upgrade) is State.PAUSED


NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("ago", "took", "fraction", "due"),
    [
        (5.0, 0.25, 0.51, True),
        (4.0, 0.25, 0.51, False),  # it would take more than a twentieth of the time
        (5.0, 0.25, 0.505, False),  # hardly anything was done since
        (10.0, 0.25, 0.5, True),  # but what is written meanwhile changes quality too
        (10.0, 2.0, 0.9, False),
        (-3600.0, 2.0, 0.9, True),  # the clock was set back
    ],
)
def test_measuring_is_due_with_progress_and_takes_a_small_share_of_the_time(
    ago: float, took: float, fraction: float, due: bool
) -> None:
    at = (NOW - timedelta(seconds=ago)).isoformat()
    assert live.due({"at": at, "fraction": 0.5, "seconds": took}, fraction, NOW, 0.05) is due
    assert live.due({}, 0.0, NOW, 0.05)


def test_the_curve_is_bounded_and_keeps_both_ends() -> None:
    points: list[Any] = []
    for step in range(1000):
        points = live.curve(points, {"fraction": step / 1000})
        assert len(points) <= live.POINTS
        assert (points[0]["fraction"], points[-1]["fraction"]) == (0, step / 1000)
    steps = np.diff([point["fraction"] for point in points])
    assert steps.max() <= 2 / live.POINTS
    assert live.curve(points, {"fraction": 0.999, "again": True})[-1] == {"fraction": 0.999, "again": True}


# --- the gate, before the cutover ---------------------------------------------------------------------------------------


def test_an_automatic_cutover_is_refused_where_the_upgraded_columns_miss_the_gate(world: World) -> None:
    fill(world, segments=2)
    upgrade = world.start(cutover="automatic", gate={"min_cmc1": 0.9})
    world.step(upgrade)
    intrude(world)
    assert world.run(upgrade) is State.FAILED
    assert "0.0000 is measured on the upgraded columns" in (world.error(upgrade) or "")
    assert told(world, upgrade)["failed"].reason == "gate_closed"
    assert world.search("old", OLD[:1], allow_partial=True).coverage.direct == 8
    lifecycle.retry(world.store, upgrade)  # measure again
    assert world.run(upgrade) is State.FAILED
    world.delete(*[f"x{row}" for row in range(8)])
    lifecycle.retry(world.store, upgrade)
    assert world.run(upgrade) is State.COMPLETED
    assert read(world, upgrade).quality["now"]["cmc1"] == 1.0


def test_an_automatic_cutover_that_was_refused_is_made_if_a_person_resumes(world: World) -> None:
    fill(world)
    upgrade = world.start(cutover="automatic", gate={"min_cmc1": 0.9})
    world.step(upgrade)
    intrude(world)
    assert world.run(upgrade) is State.FAILED
    lifecycle.resume(world.store, upgrade)
    assert world.run(upgrade) is State.COMPLETED


def test_a_manual_cutover_below_the_gate_must_be_accepted(world: World) -> None:
    fill(world)
    upgrade = world.start(cutover="manual", gate={"min_cmc1": 0.9})
    world.step(upgrade)
    intrude(world)
    assert world.run(upgrade) is State.AWAITING_CUTOVER
    assert told(world, upgrade)["gate_closed"].reason == "min_cmc1"

    def cut(**more: Any) -> Any:
        return drive.cutover(world.store, world.galleries, world.searcher, upgrade, **more)

    with pytest.raises(errors.GateClosed, match=r"0\.9000 short.*accept_below_gate"):
        cut()
    assert world.state(upgrade) is State.AWAITING_CUTOVER
    assert cut(accept_below_gate=True).changed
    assert world.state(upgrade) is State.COMPLETED
    assert not cut().changed


def test_a_cutover_that_comes_as_verifying_ends_is_judged_by_the_probes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(world)
    upgrade = world.start(cutover="manual", gate={"min_cmc1": 0.9})
    while world.state(upgrade) is not State.VERIFYING:
        world.step(upgrade)
    in_one_transaction = lifecycle.cutover

    def late(*args: Any, **more: Any) -> moves.Changed:
        world.run(upgrade)
        return in_one_transaction(*args, **more)

    monkeypatch.setattr(lifecycle, "cutover", late)
    assert drive.cutover(world.store, world.galleries, world.searcher, upgrade).changed
    assert world.state(upgrade) is State.COMPLETED
    assert read(world, upgrade).quality["now"]["cmc1"] == 1.0


def test_a_cutover_is_judged_by_columns_that_no_search_sees_yet(world: World) -> None:
    """The route that serves until then maps from the source columns, and would not see what is wrong with the new ones."""
    fill(world)
    upgrade = world.start(cutover="automatic", gate={"min_cmc1": 0.9})
    while world.state(upgrade) is not State.VERIFYING:
        world.step(upgrade)
    row = read(world, upgrade)
    compared = live.before_cutover(world.store, world.galleries, world.searcher, upgrade)
    assert compared is not None
    assert compared.after is not None
    assert world.search("new", NEW[:1], companions={"old": OLD[:1]}).coverage.forward == 8
    assert gate.closed(live.verified(row, compared, NOW)) is None
    intruders = quality.Found(compared.after.probes, [["x"]] * 8, [[0.0]] * 8)
    closed = gate.closed(live.verified(row, compared._replace(after=intruders), NOW))
    assert closed is not None
    assert closed["limit"] == "min_cmc1"


# --- score thresholds ---------------------------------------------------------------------------------------------------


def test_a_threshold_is_carried_over_by_the_probes(world: World) -> None:
    """The new model's distances are the old one's, so the threshold that keeps the share of hits accepts the same ones."""
    fill(world)
    world.transformation("plain", "old", "new", PLAIN)
    upgrade = world.start("plain", score_thresholds=[1.0, 100.0], dry_run=True)
    before = read(world, upgrade).report["score_thresholds"]
    assert [each["before"] for each in before] == [1.0, 100.0]
    assert before[0]["after"] is None
    assert world.run(upgrade) is State.COMPLETED, world.error(upgrade)
    near, far = read(world, upgrade).report["score_thresholds"]
    assert (near["accepted_before"], near["hits_before"], near["probes"]) == (8, 64, 8)
    assert near["accepted_after"] == 8
    assert 1 < near["after"] < 8  # the next item is 8 away
    assert (near["precision_before"], near["recall_before"]) == (1.0, 1.0)
    assert near["same_precision"] == near["same_recall"] == 1.0
    assert far["accepted_after"] == 64
    assert "every hit" in far["reason"]


def test_a_threshold_keeps_its_promise_on_columns_that_are_stored_in_half_the_bytes(world: World) -> None:
    random = np.random.default_rng(0)
    vectors, queries = random.normal(size=(60, 4)), random.normal(size=(20, 4))
    turned = Linear((np.array(PLAIN.embedding) * 1.1).tolist())
    world.transformation("turned", "old", "new", turned)
    world.make("half", storage_dtype="float16")
    world.upsert("old", [f"i{row}" for row in range(60)], vectors, gallery="half")
    wanted = [[f"i{row}" for row in random.choice(60, 8, replace=False)] for _ in queries]
    pairs = zip(np.float32(queries), turned(queries), strict=True)
    with world.store.catalog.transaction() as tx:
        probes = [({"old": old, "new": new}, relevant) for (old, new), relevant in zip(pairs, wanted, strict=True)]
        probe_rows.replace(tx.session, gallery_row(tx.session, "half").id, probes)
    upgrade = world.start("turned", gallery="half", score_thresholds=[0.5, 0.75, 1.0, 1.25, 1.5, 100.0])
    assert world.run(upgrade) is State.COMPLETED, world.error(upgrade)
    answer = world.search("new", turned(queries), k=10, gallery="half")
    hits = [(hit.score, hit.id in relevant) for row, relevant in enumerate(wanted) for hit in answer.hits(row)]
    for told in read(world, upgrade).report["score_thresholds"]:
        assert told["accepted_after"] == sum(score <= told["after"] for score, _ in hits)
        precise = [right for score, right in hits if score <= told["same_precision"]]
        assert np.mean(precise) >= told["precision_before"]
        found = sum(right for score, right in hits if score <= told["same_recall"])
        assert found / (20 * 8) >= told["recall_before"]


def test_a_threshold_without_probes_says_why_it_is_not_known(world: World) -> None:
    world.upsert("old", IDS, OLD, side=SIDE)
    upgrade = world.start(score_thresholds=[0.75])
    assert world.run(upgrade) is State.COMPLETED
    (entry,) = read(world, upgrade).report["score_thresholds"]
    assert entry["after"] is None
    assert "no probes" in entry["reason"]


def test_backward_is_what_it_says() -> None:
    """The world's transformations undo each other, on which the probes of this file rely."""
    np.testing.assert_array_equal(BACKWARD(PLAIN(OLD)), OLD)
