"""What is checked before an upgrade writes, and before it cuts over: dry runs, validation, the gate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.transformations import Fct, build
from tests.service.world import GALLERY, NEW, OLD, SIDE, UNITS, World, forward, linear, probe


def test_a_dry_run_reports_and_changes_nothing(world: World) -> None:
    upgrade = world.start(dry_run=True)
    files = world.everything()["files"]
    world.work()
    document = world.upgrade(upgrade)
    assert document["state"] == "completed"
    assert document["dry_run"]
    assert document["report"]["bytes_needed"] > 0
    assert [check["passed"] for check in document["report"]["checks"]] == [True] * 8
    assert world.everything()["files"] == files
    assert world.get(f"/galleries/{GALLERY}")["model"] == "old"
    world.refused(world.client.post(f"/admin/upgrades/{upgrade}/finalize"), 409, "invalid_state_transition")


def test_a_dry_run_that_failed_is_over_and_touches_no_upgrade_that_came_after_it(world: World) -> None:
    body = {"probes": [{"vectors": {"old": UNITS[0].tolist(), "new": [0, *UNITS[0].tolist()]}, "relevant": ["none"]}]}
    world.client.put(f"/galleries/{GALLERY}/probes", json=body).raise_for_status()
    dry = world.start(dry_run=True, gate={"min_cmc1": 1.0})
    world.work()
    assert (world.upgrade(dry)["state"], world.upgrade(dry)["allowed"]) == ("failed", [])
    assert 'forwardfill_upgrades{state="failed"}' not in world.client.get("/metrics").text
    world.upgraded()
    for verb in ("resume", "cancel", "retry"):
        answer = world.client.post(f"/admin/upgrades/{dry}/{verb}")
        assert "start another" in world.refused(answer, 409, "invalid_state_transition")["detail"]
    assert world.get(f"/galleries/{GALLERY}")["model"] == "new"


def test_a_rollback_goes_through_while_a_dry_run_waits_and_its_end_changes_nothing(world: World) -> None:
    world.model("newest", NEW)
    world.transformation("onward", "new", "newest", "forward", linear(np.eye(NEW)))
    upgrade = world.upgraded()
    dry = world.start(transformation="onward", dry_run=True)
    assert world.verb(upgrade, "rollback")["state"] == "rolled_back"
    assert world.verb(dry, "cancel")["state"] == "cancelled"
    assert world.get(f"/galleries/{GALLERY}")["model"] == "old"


def test_what_validation_refuses_changes_no_search_and_no_write(empty: World) -> None:
    empty.prepared()
    bare = {"id": "bare", "embedding": UNITS[0].tolist()}
    empty.upsert(bare)
    network = build(Fct(source_dimension=OLD, target_dimension=NEW, side_dimension=SIDE, hidden=4))
    empty.model("sided", OLD, side_information={"dimension": SIDE})
    empty.post("/galleries", {"name": "sided", "model": "sided"})
    empty.post("/galleries/sided/items", {"model": "sided", "items": [bare]})
    empty.transformation("needs-side", "sided", "new", "forward", network)
    refused = empty.start(gallery="sided", transformation="needs-side")
    empty.work()
    assert (empty.upgrade(refused)["state"], empty.upgrade(refused)["started_at"]) == ("failed", None)
    empty.post("/galleries/sided/items", {"model": "sided", "items": [bare]})  # as before

    def first() -> str:
        return str(empty.new_search(0)["hits"][0]["id"])

    empty.upsert({"id": "other", "embedding": UNITS[1].tolist()})
    before = first()
    wrong = linear(np.vstack([np.zeros((1, OLD)), np.eye(OLD)[[1, 0, 2, 3]]]))
    empty.transformation("wrong", "old", "new", "forward", wrong)
    empty.transformation("right", "old", "new", "forward", forward())  # the latest, which searches use
    upgrade = empty.start(transformation="wrong", gate={"min_cmc1": 1.0})
    assert first() == before == "bare"
    empty.work()
    assert empty.upgrade(upgrade)["state"] == "failed"
    assert first() == before


def test_a_dry_run_of_an_empty_gallery_reports_what_one_of_a_filled_gallery_does(empty: World) -> None:
    empty.prepared()
    of_none = empty.start(dry_run=True)
    empty.work()
    empty.filled()
    of_some = empty.start(dry_run=True)
    empty.work()
    empty_report, filled_report = (empty.upgrade(each)["report"] for each in (of_none, of_some))
    assert empty.upgrade(of_none)["state"] == "completed"
    assert [(each["check"], each["passed"]) for each in empty_report["checks"]] == [
        (each["check"], True) for each in filled_report["checks"]
    ]
    assert empty_report.keys() == filled_report.keys()
    assert (empty_report["items"], empty_report["bytes_needed"]) == (0, 0)


def test_a_gate_that_is_missed_fails_the_upgrade_and_says_by_how_much(world: World) -> None:
    upgrade = world.start(gate={"min_cmc1": 0.9})
    world.work()
    document = world.upgrade(upgrade)
    assert document["state"] == "failed"
    assert "probes" in document["error"]
    condition = document["conditions"][0]
    assert (condition["type"], condition["reason"], condition["detail"]) == (
        "failed",
        "validation_failed",
        document["error"],
    )
    world.verb(upgrade, "cancel")


def test_a_cutover_below_the_gate_is_refused_until_it_is_accepted(world: World) -> None:
    probe(world, ["item-0", "item-1", "item-2", "item-3"])
    upgrade = world.start(cutover="manual", gate={"max_negative_flips": 0, "min_map": 0.9}, score_thresholds=[0.1])
    world.work()
    document = world.upgrade(upgrade)
    assert document["state"] == "awaiting_cutover", document
    (threshold,) = document["report"]["score_thresholds"]
    assert (threshold["accepted_before"], threshold["accepted_after"], threshold["probes"]) == (4, 4, 4)
    assert document["quality"]["expected_after"]["map"] == 1.0
    probe(world, ["item-0", "item-1", "item-2", "item-0"])  # what is relevant is judged anew when it is asked for
    problem = world.refused(world.client.post(f"/admin/upgrades/{upgrade}/cutover"), 409, "gate_closed")
    assert problem["limit"] == "min_map"
    assert "accept_below_gate" in problem["detail"]
    assert world.upgrade(upgrade)["state"] == "awaiting_cutover"
    done = world.verb(upgrade, "cutover", {"accept_below_gate": True})
    assert (done["state"], done["quality"]["now"]["cmc1"]) == ("completed", 0.75)
    world.verb(upgrade, "cutover", status=200)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"gate": {"min_luck": 0.5}}, "/gate/min_luck"),
        ({"gate": {"max_negative_flips": 0.5}}, "/gate/max_negative_flips"),
        ({"gate": {"max_map_drop": 2}}, "/gate/max_map_drop"),
        ({"score_thresholds": ["high"]}, "/score_thresholds/0"),
    ],
)
def test_a_limit_that_is_none_is_refused_by_name(world: World, body: dict[str, Any], pointer: str) -> None:
    asked = {"gallery": GALLERY, "transformation": "old-to-new", **body}
    problem = world.refused(world.client.post("/admin/upgrades", json=asked), 422, "invalid_request")
    assert problem["errors"][0]["pointer"] == pointer
