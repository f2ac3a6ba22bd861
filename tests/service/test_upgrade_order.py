"""What comes first: the segments of an upgrade, and the items to embed again after it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select

from gallery.catalog.tables import SegmentRow
from models.runtime import Transform
from models.transformations import Fct, build
from service import refresh
from tests.acceptance.system import wait_for
from tests.service.world import GALLERY, NEW, OLD, UNITS, World, opened, probe
from workers.settings import WorkerSettings
from workers.tasks import Worker


def test_without_an_uncertainty_head_there_is_no_refinement_list(world: World) -> None:
    upgrade = world.upgraded()
    problem = world.refused(world.client.get(f"/admin/upgrades/{upgrade}/refinement"), 409, "no_uncertainty")
    assert "uncertainty head" in problem["detail"]


def with_fastfill(world: World) -> list[float]:
    """Register a transformation with an uncertainty head; the log-variance that it predicts of each item."""
    architecture = Fct(source_dimension=OLD, target_dimension=NEW, side_dimension=None, hidden=8)
    torch.manual_seed(0)
    module = build(architecture, optional={"uncertainty.weight", "uncertainty.bias"}).eval()
    world.transformation("fastfill", "old", "new", "forward", module)
    with torch.inference_mode():
        predicted: list[float] = module.log_variance(module.raw(torch.as_tensor(UNITS))).tolist()
    return predicted


def test_the_refinement_list_puts_the_least_certain_first(world: World) -> None:
    predicted = with_fastfill(world)
    upgrade = world.upgraded(transformation="fastfill")
    world.post(f"/galleries/{GALLERY}/items/delete", {"ids": ["item-2"]})
    expected = [f"item-{at}" for at in sorted((0, 1, 3), key=lambda at: -predicted[at])]
    assert world.get(f"/admin/upgrades/{upgrade}/refinement")["ids"] == expected
    page = world.get(f"/admin/upgrades/{upgrade}/refinement", params={"page_size": 2})
    rest = world.get(f"/admin/upgrades/{upgrade}/refinement", params={"page_token": page["next_page_token"]})
    assert page["ids"] + rest["ids"] == expected
    assert rest["next_page_token"] is None
    for token in ("Im8i", "LTU"):  # "o", -5
        answer = world.client.get(f"/admin/upgrades/{upgrade}/refinement", params={"page_token": token})
        world.refused(answer, 422, "invalid_request")
    assert (page["native_items"], page["derived_items"], page["fraction"]) == (0, 3, 0.0)
    left = page["predicted_variance_left"]
    assert (left, left[0], left[-1]) == (sorted(left, reverse=True), 1.0, pytest.approx(0.0))
    world.verb(upgrade, "finalize")
    world.refused(world.client.get(f"/admin/upgrades/{upgrade}/refinement"), 409, "no_uncertainty")


def test_a_further_page_of_the_refinement_list_predicts_only_what_is_new(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the list of a million items, a thousand to a page, is as much work as a thousand upgrades."""
    with_fastfill(world)
    upgrade = world.upgraded(transformation="fastfill")
    predicted, predict = list[int](), Transform.uncertainty

    def counted(transform: Transform, embeddings: Any, side: Any = None) -> Any:
        predicted.append(len(embeddings))
        return predict(transform, embeddings, side)

    monkeypatch.setattr(Transform, "uncertainty", counted)
    page = world.get(f"/admin/upgrades/{upgrade}/refinement", params={"page_size": 2})
    assert predicted == [1, 1, 1, 1]
    world.upsert({"id": page["ids"][0], "embedding": [0] * NEW}, model="new")
    world.upsert({"id": "later", "embedding": UNITS[0].tolist()})
    assert len(world.get(f"/admin/upgrades/{upgrade}/refinement")["ids"]) == 4
    assert predicted == [1, 1, 1, 1, 1]


def test_what_is_embedded_again_leaves_the_list_and_the_curve_shows_what_it_paid(world: World) -> None:
    with_fastfill(world)
    probe(world, ["item-0", "item-1", "item-2", "item-3"])
    upgrade = world.upgraded(transformation="fastfill")
    worker = Worker(world.store, WorkerSettings())
    worker.work()
    for at in range(4):
        world.upsert({"id": f"item-{at}", "embedding": [0, *UNITS[at].tolist()]}, model="new")
    listed = world.get(f"/admin/upgrades/{upgrade}/refinement")
    assert (listed["ids"], listed["native_items"], listed["derived_items"], listed["fraction"]) == ([], 4, 0, 1.0)
    assert listed["predicted_variance_left"] == []

    def curve_of_two() -> Any:
        worker.work()  # which measures in a twentieth of its time only
        found = world.get(f"/admin/upgrades/{upgrade}/refinement")["quality"]
        return found if len(found) == 2 else None

    curve = wait_for(curve_of_two, 20, lambda: "it never looks again")
    assert [(point["fraction"], point["items"]) for point in curve] == [(0.0, 0), (1.0, 4)]
    assert curve[0]["cmc1"] < curve[1]["cmc1"] == 1.0
    assert world.upgrade(upgrade)["quality"]["by_refinement"] == curve


def as_done(world: World, upgrade: str) -> list[str]:
    """Run the upgrade to its end; the items as they came to the target model."""
    found: list[str] = []
    while world.work(steps=1):
        for item in (f"item-{at}" for at in range(len(UNITS))):
            columns = world.get(f"/galleries/{GALLERY}/items/{item}")["columns"]
            if item not in found and "new" in [column["model"] for column in columns]:
                found.append(item)
    assert world.upgrade(upgrade)["state"] == "completed", world.upgrade(upgrade)
    return found


def test_by_uncertainty_the_least_certain_items_are_upgraded_first(world: World) -> None:
    predicted = with_fastfill(world)
    expected = sorted(range(len(UNITS)), key=lambda at: -predicted[at])
    assert expected != sorted(expected)
    upgrade = world.start(transformation="fastfill", order="uncertainty")
    assert as_done(world, upgrade) == [f"item-{at}" for at in expected]
    document = world.upgrade(upgrade)
    assert document["order"] == "uncertainty"
    first = document["report"]["first_segments"]
    assert [each["uncertainty"] for each in first] == pytest.approx([predicted[at] for at in expected], abs=1e-5)


def test_by_searches_what_was_found_most_is_upgraded_first(world: World) -> None:
    for axis in (3, 1, 3):
        world.old_search(axis, k=1)
    upgrade = world.start(order="most_searched")
    assert as_done(world, upgrade) == ["item-3", "item-1", "item-0", "item-2"]
    document = world.upgrade(upgrade)
    assert document["order"] == "most_searched"
    assert [each["hits"] for each in document["report"]["first_segments"]] == [2, 1, 0, 0]


def test_a_dry_run_reports_which_segments_would_go_first(world: World) -> None:
    world.post(f"/galleries/{GALLERY}/search/batch", {"model": "old", "queries": UNITS[1:3].tolist(), "k": 1})
    world.new_search(2, k=1)
    upgrade = world.start(order="most_searched", dry_run=True)
    world.work()
    document = world.upgrade(upgrade)
    assert (document["state"], document["order"]) == ("completed", "most_searched")
    assert [each["hits"] for each in document["report"]["first_segments"]] == [2, 1, 0, 0]
    assert {each["items"] for each in document["report"]["first_segments"]} == {1}


def test_a_transformation_that_predicts_no_uncertainty_cannot_order_by_it(world: World) -> None:
    body = {"gallery": GALLERY, "transformation": "old-to-new", "order": "uncertainty"}
    problem = world.refused(world.client.post("/admin/upgrades", json=body), 422, "wrong_transformation")
    assert problem["errors"][0]["pointer"] == "/order"
    assert "old-to-new predicts no uncertainty" in problem["detail"]
    assert world.get("/admin/upgrades")["upgrades"] == []


def test_hits_that_a_process_counted_are_known_after_it_ended(tmp_path: Path) -> None:
    with opened(tmp_path) as before:
        before.prepared().filled().old_search(2, k=1)
    with opened(tmp_path) as after:
        after.old_search(2, k=1)
        after.old_search(0, k=1)
        upgrade = after.start(order="most_searched")
        assert as_done(after, upgrade) == ["item-2", "item-0", "item-1", "item-3"]
        assert [each["hits"] for each in after.upgrade(upgrade)["report"]["first_segments"]] == [2, 1, 0, 0]


def test_a_process_tells_its_hits_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh, "_PUBLISH_SECONDS", 0.02)
    monkeypatch.setattr(refresh, "_HITS_SECONDS", 0.02)
    with opened(tmp_path) as world:
        world.prepared().filled().old_search(2, k=1)
        deadline = time.monotonic() + 20
        while (told := hits_in_the_catalog(world)) != [0, 0, 1, 0]:
            assert time.monotonic() < deadline, told


def hits_in_the_catalog(world: World) -> list[int]:
    """Of each segment."""
    with world.store.catalog.reading() as session:
        return list(session.scalars(select(SegmentRow.hits).order_by(SegmentRow.id)))
