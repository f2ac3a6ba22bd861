"""An upgrade over REST, from start to end, under searches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event

from tests.acceptance.system import wait_for
from tests.service.world import GALLERY, OLD, UNITS, World, backward, forward


def answers(world: World) -> list[Any]:
    """What every old-model query finds."""
    return [world.old_search(axis)["hits"] for axis in range(len(UNITS))]


def test_a_search_is_right_at_every_step_of_an_upgrade(world: World) -> None:
    upgrade = world.start()
    seen = set()
    while True:
        answer = world.new_search(1)
        assert [hit["id"] for hit in answer["hits"]] == ["item-1", "item-0", "item-2", "item-3"]
        assert answer["served"]["score_space"] == "new"
        routes = answer["served"]["routes"]
        assert routes["direct"] + routes["forward"] == 4
        assert routes["backward"] == routes["unreachable"] == 0
        assert {hit["origin"] for hit in answer["hits"]} == {"derived"}
        seen.add(routes["direct"])
        old = world.old_search(1)
        assert [hit["id"] for hit in old["hits"]] == ["item-1", "item-0", "item-2", "item-3"]
        assert old["served"]["routes"] == {"direct": 4, "forward": 0, "backward": 0, "unreachable": 0}
        if not world.work(steps=1):
            break
    assert seen == {0, 1, 2, 3, 4}
    document = world.upgrade(upgrade)
    assert document["state"] == "completed"
    assert document["progress"]["fraction"] == 1.0
    assert world.get(f"/galleries/{GALLERY}")["model"] == "new"


def test_the_document_counts_from_rows(world: World) -> None:
    answer = world.client.post("/admin/upgrades", json={"gallery": GALLERY, "target_model": "new"})
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/admin/upgrades/{answer.json()['id']}"
    assert answer.json()["state"] == "pending"
    world.work(steps=2)
    document = world.get(answer.headers["location"])
    assert document["gallery"] == GALLERY
    assert (document["source_model"], document["target_model"]) == ("old", "new")
    assert document["transformation"] == "old-to-new"
    assert document["artifact_sha256"] == world.get("/transformations/old-to-new")["artifact"]
    progress = document["progress"]
    assert (progress["items_total"], progress["items_done"], progress["fraction"]) == (4, 1, 0.25)
    assert (progress["segments_total"], progress["segments_done"], progress["segments_failed"]) == (4, 1, 0)
    assert document["quality"] == {
        "before": None,
        "now": None,
        "expected_after": None,
        "by_progress": [],
        "by_refinement": [],
    }
    assert document["started_at"].endswith("Z")
    assert document["finished_at"] is None
    assert document["allowed"] == ["pause", "cancel", "retry"]
    assert world.get("/admin/upgrades")["upgrades"] == [document]


def test_a_list_of_upgrades_takes_a_statement_or_two_for_an_open_one_and_none_for_one_that_is_over(
    world: World,
) -> None:
    asked: list[str] = []

    def listen(_c: object, _cursor: object, statement: str, *_: object) -> None:
        if threading.current_thread().name not in {"watch", "tell"}:
            asked.append(statement)

    def listed() -> tuple[int, list[str]]:
        asked.clear()
        upgrades = world.get("/admin/upgrades")["upgrades"]
        return len(asked), [each["state"] for each in upgrades]

    event.listen(world.store.catalog.engine, "before_cursor_execute", listen)
    taken, none = listed()
    assert none == []
    for _ in range(3):
        world.verb(world.start(), "cancel")
    assert listed() == (taken, ["cancelled"] * 3)
    for at in range(3):
        world.post("/galleries", {"name": f"g{at}", "model": "old"})
        item = {"id": "a", "embedding": UNITS[0].tolist()}
        world.post(f"/galleries/g{at}/items", {"model": "old", "items": [item]})
        world.post("/admin/upgrades", {"gallery": f"g{at}", "transformation": "old-to-new"})
    assert listed() == (taken + 3, ["pending"] * 3 + ["cancelled"] * 3)
    world.work()
    assert listed() == (taken + 2 * 3, ["completed"] * 3 + ["cancelled"] * 3)


def test_every_change_nudges_the_workers(world: World) -> None:
    before = len(world.nudges)
    upgrade = world.start()
    assert len(world.nudges) == before + 1
    world.verb(upgrade, "pause")
    world.verb(upgrade, "resume")
    world.client.patch(f"/admin/upgrades/{upgrade}", json={"throttle": {"duty_cycle": 0.5}})
    assert len(world.nudges) == before + 4
    world.upsert({"id": "late", "embedding": [1, 1, 1, 1]})
    assert len(world.nudges) == before + 5


def test_a_write_that_no_upgrade_has_work_for_nudges_nobody(world: World) -> None:
    world.start()
    before = len(world.nudges)
    world.upsert({"id": "late", "embedding": [1, 1, 1, 1, 1]}, model="new")
    assert len(world.nudges) == before


def test_an_idempotency_key_starts_one_upgrade(world: World) -> None:
    headers = {"Idempotency-Key": "once"}
    body = {"gallery": GALLERY, "transformation": "old-to-new"}
    first = world.client.post("/admin/upgrades", json=body, headers=headers)
    again = world.client.post("/admin/upgrades", json=dict(reversed(body.items())), headers=headers)
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"]
    assert first.headers["location"] == again.headers["location"]
    other = world.client.post("/admin/upgrades", json={**body, "cutover": "manual"}, headers=headers)
    world.refused(other, 422, "idempotency_key_reused")
    assert len(world.get("/admin/upgrades")["upgrades"]) == 1
    world.refused(world.client.post("/admin/upgrades", json=body), 409, "upgrade_in_progress")


def test_a_key_answers_the_same_whatever_became_of_its_upgrade(world: World) -> None:
    headers, body = {"Idempotency-Key": "once"}, {"gallery": GALLERY, "transformation": "old-to-new"}
    first = world.client.post("/admin/upgrades", json=body, headers=headers).json()["id"]
    world.work()
    again = world.client.post("/admin/upgrades", json=body, headers=headers)
    assert (again.status_code, again.json()["id"], again.json()["state"]) == (202, first, "completed")
    world.client.delete(f"/galleries/{GALLERY}")
    again = world.client.post("/admin/upgrades", json=body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, first)


def test_of_requests_with_one_key_at_once_all_get_the_one_upgrade(world: World) -> None:
    body = {"gallery": GALLERY, "transformation": "old-to-new"}
    with ThreadPoolExecutor(8) as threads:
        sent = [
            threads.submit(world.client.post, "/admin/upgrades", json=body, headers={"Idempotency-Key": "once"})
            for _ in range(8)
        ]
        answers = [each.result() for each in sent]
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_a_verb_is_accepted_once_and_then_already_so(world: World) -> None:
    upgrade = world.start()
    world.work(steps=2)
    assert world.verb(upgrade, "pause")["state"] == "paused"
    paused = world.verb(upgrade, "pause", status=200)
    assert paused["conditions"][0]["type"] == "paused"
    assert world.work() == 0
    assert world.verb(upgrade, "resume")["state"] == "running"
    world.verb(upgrade, "resume", status=200)
    world.verb(upgrade, "retry", status=200)
    assert world.verb(upgrade, "cancel")["state"] == "cancelled"
    world.verb(upgrade, "cancel", status=200)


def test_an_impossible_verb_names_what_is_possible(world: World) -> None:
    upgrade = world.start()
    for verb in ("rollback", "finalize", "cutover"):
        problem = world.refused(world.client.post(f"/admin/upgrades/{upgrade}/{verb}"), 409, "invalid_state_transition")
        assert problem["allowed"] == ["pause", "cancel"]
    world.work()
    problem = world.refused(world.client.post(f"/admin/upgrades/{upgrade}/pause"), 409, "invalid_state_transition")
    assert problem["allowed"] == ["rollback", "finalize"]
    throttle = world.client.patch(f"/admin/upgrades/{upgrade}", json={"throttle": {"duty_cycle": 1}})
    world.refused(throttle, 409, "invalid_state_transition")


def test_a_verb_passes_over_nothing_that_it_does_not_know(world: World) -> None:
    upgrade = world.upgraded()
    answer = world.client.post(f"/admin/upgrades/{upgrade}/finalize", json={"dry_run": True})
    problem = world.refused(answer, 422, "invalid_request")
    assert problem["errors"][0]["pointer"] == "/dry_run"
    assert world.upgrade(upgrade)["state"] == "completed"
    assert world.verb(upgrade, "finalize", {})["state"] == "finalized"


def test_without_its_gallery_an_upgrade_takes_no_verb(world: World) -> None:
    upgrade = world.upgraded()
    world.client.delete(f"/galleries/{GALLERY}")
    assert (world.upgrade(upgrade)["state"], world.upgrade(upgrade)["allowed"]) == ("completed", [])
    for verb in ("rollback", "finalize", "pause"):
        problem = world.refused(world.client.post(f"/admin/upgrades/{upgrade}/{verb}"), 409, "invalid_state_transition")
        assert problem["allowed"] == []
        assert "gallery of this upgrade was deleted" in problem["detail"]
    world.verb(upgrade, "cutover", status=200)  # which is so already
    throttle = world.client.patch(f"/admin/upgrades/{upgrade}", json={"throttle": {"duty_cycle": 1}})
    assert world.refused(throttle, 409, "invalid_state_transition")["allowed"] == []


def test_the_throttle_changes_while_it_runs(world: World) -> None:
    upgrade = world.start(throttle={"items_per_second": 0.001})
    world.work()
    document = world.upgrade(upgrade)
    assert (document["state"], document["progress"]["items_done"]) == ("running", 0)  # the first waits for itself too
    assert document["conditions"][0]["type"] == "throttled"
    assert document["conditions"][0]["reason"] == "items_per_second"
    body = {"throttle": {"items_per_second": None, "duty_cycle": 1}}
    changed = world.client.patch(f"/admin/upgrades/{upgrade}", json=body)
    assert changed.status_code == 200
    assert changed.json()["throttle"] == {"duty_cycle": 1}
    world.work()
    assert world.upgrade(upgrade)["state"] == "completed"


def test_searches_that_are_slower_than_the_limit_hold_it_back_until_the_limit_is_lifted(world: World) -> None:
    upgrade = world.start(throttle={"max_search_p99_ms": 1e-6})
    world.work(steps=2)
    world.old_search(0)  # no search is as fast as that
    (condition,) = wait_for(
        lambda: world.upgrade(upgrade)["conditions"], 20, lambda: "the process does not say how slow its searches are"
    )
    assert (condition["type"], condition["reason"]) == ("throttled", "search_p99_above_limit")
    assert "ms > 1e-06 ms: no segment starts until searches are faster" in condition["detail"]
    assert world.work() == 0
    assert world.upgrade(upgrade)["progress"]["segments_done"] == 1
    world.client.patch(f"/admin/upgrades/{upgrade}", json={"throttle": {"max_search_p99_ms": None}})
    world.work()
    assert world.upgrade(upgrade)["state"] == "completed"


def test_a_rollback_gives_the_same_answers_to_the_last_bit(world: World) -> None:
    before, files = answers(world), world.everything()["files"]
    upgrade = world.upgraded()
    assert world.verb(upgrade, "rollback")["state"] == "rolled_back"
    assert answers(world) == before
    assert world.everything()["files"] == files
    assert world.get(f"/galleries/{GALLERY}")["model"] == "old"
    world.verb(upgrade, "rollback", status=200)


def test_a_cancelled_upgrade_leaves_the_gallery_as_it_was(world: World) -> None:
    before, files = answers(world), world.everything()["files"]
    upgrade = world.start()
    world.work(steps=3)
    world.verb(upgrade, "cancel")
    assert answers(world) == before
    assert world.everything()["files"] == files


@pytest.mark.parametrize(("verb", "state"), [("cancel", "cancelled"), ("rollback", "rolled_back")])
def test_native_items_are_not_made_unreachable_without_consent(world: World, verb: str, state: str) -> None:
    upgrade = world.start()
    if verb == "rollback":
        world.work()
    world.upsert({"id": "native", "embedding": [7, 0, 0, 0, 0]}, model="new")
    problem = world.refused(
        world.client.post(f"/admin/upgrades/{upgrade}/{verb}"), 409, "native_items_would_be_unreachable"
    )
    assert problem["items"] == 1
    assert "queries of old are then refused as `no_route`" in problem["detail"]
    refused = world.client.post(f"/admin/upgrades/{upgrade}/{verb}", json={"accept_unreachable": False})
    assert refused.status_code == 409
    assert world.verb(upgrade, verb, {"accept_unreachable": True})["state"] == state
    found = world.search([7, 0, 0, 0, 0], "new", allow_partial=True)
    assert [hit["id"] for hit in found["hits"]] == ["native"]
    old = {"model": "old", "vector": UNITS[0].tolist()}
    world.refused(world.client.post(f"/galleries/{GALLERY}/search", json=old), 409, "no_route")
    assert "native" not in [hit["id"] for hit in world.old_search(0, allow_partial=True)["hits"]]
    assert "native" in world.get(f"/galleries/{GALLERY}/items/native")["id"]


def test_a_rollback_needs_no_consent_for_native_items_of_another_gallery(world: World) -> None:
    upgrade = world.upgraded()
    world.post("/galleries", {"name": "others", "model": "new"})
    world.post("/galleries/others/items", {"model": "new", "items": [{"id": "native", "embedding": [0, 0, 0, 1, 0]}]})
    assert world.verb(upgrade, "rollback")["state"] == "rolled_back"


def test_after_finalize_the_source_model_is_retired(world: World) -> None:
    upgrade = world.upgraded()
    before = world.get(f"/galleries/{GALLERY}")["columns"]
    frees = world.upgrade(upgrade)["finalize_frees"]
    assert frees == next(column["bytes"] for column in before if column["model"] == "old")
    done = world.verb(upgrade, "finalize")
    assert (done["state"], done["report"]["bytes_freed"], done["finalize_frees"]) == ("finalized", frees, None)
    world.verb(upgrade, "finalize", status=200)
    search = {"model": "old", "vector": UNITS[0].tolist()}
    world.refused(world.client.post(f"/galleries/{GALLERY}/search", json=search), 409, "model_retired")
    items = {"model": "old", "items": [{"id": "late", "embedding": UNITS[0].tolist()}]}
    world.refused(world.client.post(f"/galleries/{GALLERY}/items", json=items), 409, "model_retired")
    columns = world.get(f"/galleries/{GALLERY}")["columns"]
    assert [column["model"] for column in columns] == ["new"]
    assert [hit["id"] for hit in world.search([0, 1, 0, 0, 0], "new", k=1)["hits"]] == ["item-0"]


def test_a_backward_transformation_serves_queries_of_a_retired_model_but_not_its_writes(world: World) -> None:
    world.verb(world.upgraded(), "finalize")
    world.transformation("as-new", "old", "new", "backward", forward())
    assert world.old_search(0)["served"]["score_space"] == "new"
    items = {"model": "old", "items": [{"id": "late", "embedding": UNITS[0].tolist()}]}
    world.refused(world.client.post(f"/galleries/{GALLERY}/items", json=items), 409, "model_retired")


def test_a_model_stays_retired_while_the_next_upgrade_runs(world: World) -> None:
    world.verb(world.upgraded(), "finalize")
    world.model("newest", OLD)
    world.transformation("new-to-newest", "new", "newest", "forward", backward())
    world.start(transformation="new-to-newest")
    items = {"model": "old", "items": [{"id": "late", "embedding": UNITS[0].tolist()}]}
    world.refused(world.client.post(f"/galleries/{GALLERY}/items", json=items), 409, "model_retired")


def test_a_retired_model_is_refused_also_where_there_are_no_items(world: World) -> None:
    world.verb(world.upgraded(), "finalize")
    world.post(f"/galleries/{GALLERY}/items/delete", {"ids": [f"item-{at}" for at in range(4)]})
    search = {"model": "old", "vector": UNITS[0].tolist()}
    world.refused(world.client.post(f"/galleries/{GALLERY}/search", json=search), 409, "model_retired")
    assert world.old_search(0, allow_partial=True)["hits"] == world.new_search(0)["hits"] == []
    world.transformation("new-to-old", "new", "old", "backward", backward())
    assert world.old_search(0)["hits"] == []


def test_a_backward_transformation_serves_the_retired_model_no_more_than_it_can(world: World) -> None:
    world.transformation("new-to-old", "new", "old", "backward", backward())
    upgrade = world.upgraded()
    world.verb(upgrade, "finalize")
    answer = world.old_search(2)
    assert answer["served"]["routes"]["backward"] == 4
    assert answer["hits"][0]["id"] == "item-2"


def test_a_source_model_write_after_completion_is_upgraded_at_once(world: World) -> None:
    world.upgraded()
    world.upsert({"id": "late", "embedding": [0, 0, 8, 0]})
    answer = world.search([0, 0, 0, 8, 0], "new", k=1)
    assert answer["hits"] == [{"id": "late", "score": 0.0, "origin": "derived"}]
    assert answer["served"]["routes"]["direct"] == 5


def test_what_is_written_during_an_upgrade_is_upgraded_too(world: World) -> None:
    upgrade = world.start()
    world.work(steps=2)
    world.upsert({"id": "late", "embedding": [0, 0, 8, 0]})
    world.upsert({"id": "native", "embedding": [9, 0, 0, 0, 0]}, model="new")
    world.work()
    document = world.upgrade(upgrade)
    assert document["state"] == "completed"
    assert document["progress"]["items_done"] == 5
    answer = world.search([0, 0, 0, 8, 0], "new")
    assert answer["served"]["routes"]["direct"] == 6
    assert {hit["id"]: hit["origin"] for hit in answer["hits"]}["native"] == "native"


def test_an_upgrade_of_an_empty_gallery_completes_at_once(empty: World) -> None:
    empty.prepared()
    upgrade = empty.start()
    assert empty.upgrade(upgrade)["state"] == "completed"
    assert empty.upgrade(upgrade)["progress"]["fraction"] == 1.0
    assert empty.get(f"/galleries/{GALLERY}")["model"] == "new"


def test_a_manual_cutover_waits_to_be_asked(world: World) -> None:
    upgrade = world.start(cutover="manual")
    world.work()
    assert world.upgrade(upgrade)["state"] == "awaiting_cutover"
    assert world.new_search(0)["served"]["routes"]["forward"] == 4
    assert world.verb(upgrade, "cutover")["state"] == "completed"
    assert world.new_search(0)["served"]["routes"]["direct"] == 4


def test_failed_segments_are_listed_with_their_error_and_can_be_retried(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade = world.start()
    world.work(steps=2)
    apply_each: Callable[..., Any] = world.store.transforms.apply_each

    def fail(*_: Any) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(world.store.transforms, "apply_each", fail)
    world.work()
    assert world.upgrade(upgrade)["state"] == "failed"
    page = world.get(f"/admin/upgrades/{upgrade}/failures", params={"page_size": 2})
    assert len(page["failures"]) == 2
    assert "the disk is gone" in page["failures"][0]["error"]
    assert page["failures"][0]["attempts"] == 3
    rest = world.get(f"/admin/upgrades/{upgrade}/failures", params={"page_token": page["next_page_token"]})
    assert len(rest["failures"]) == 1
    monkeypatch.setattr(world.store.transforms, "apply_each", apply_each)
    assert world.verb(upgrade, "retry")["state"] == "running"
    world.work()
    assert world.upgrade(upgrade)["state"] == "completed"


def test_upgrades_are_listed_newest_first(world: World) -> None:
    first = world.start()
    world.verb(first, "cancel")
    second = world.start()
    page = world.get("/admin/upgrades", params={"page_size": 1})
    assert [each["id"] for each in page["upgrades"]] == [second]
    page = world.get("/admin/upgrades", params={"page_token": page["next_page_token"]})
    assert [each["id"] for each in page["upgrades"]] == [first]
