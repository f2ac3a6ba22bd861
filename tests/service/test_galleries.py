"""Galleries and items over REST."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import event

from tests.acceptance.system import wait_for
from tests.service.world import GALLERY, OLD, UNITS, World, linear, opened
from workers.settings import WorkerSettings
from workers.tasks import Worker

ITEMS = f"/galleries/{GALLERY}/items"


def test_a_gallery_says_what_it_holds(world: World) -> None:
    document = world.get(f"/galleries/{GALLERY}")
    created = document.pop("created_at")
    assert created.endswith("Z")
    assert document.pop("columns") == [
        {
            "model": "old",
            "native_items": 4,
            "derived_items": 0,
            "lineages": [],
            "bytes": 4 * (128 + 4 * OLD),
            "index": {"kind": "flat", "bytes": 0, "recall_at_10": None, "segments": []},
        }
    ]
    assert document == {
        "name": GALLERY,
        "model": "old",
        "items": 4,
        "segments": 4,
        "version": 4,
        "storage_dtype": "float32",
        "index": {"kind": "auto"},
        "side_information": {"items": 0, "bytes": 0},
        "active_upgrade": None,
    }
    assert world.get("/galleries")["galleries"][0]["name"] == GALLERY


def test_a_gallery_tells_the_recall_of_its_indexes(world: World) -> None:
    world.store.settings.exact_below = 20
    world.upsert(*({"id": f"more-{at}", "embedding": [at, 1, 0, 0]} for at in range(20)))
    Worker(world.store, WorkerSettings()).work()
    index = world.get(f"/galleries/{GALLERY}")["columns"][0]["index"]
    assert (index["kind"], index["recall_at_10"]) == ("ivf_pq", 1.0)
    (segment,) = index["segments"]
    assert (segment["rows"], segment["kind"], segment["recall_at_10"]) == (20, "ivf_pq", 1.0)
    assert segment["nprobe"] >= 1


@pytest.mark.parametrize("path", ["/galleries", f"/galleries/{GALLERY}"])
def test_a_page_of_galleries_takes_as_many_statements_as_one_gallery(world: World, path: str) -> None:
    """Every open dashboard asks for the page each three seconds."""
    statements: list[str] = []

    def asked() -> int:
        statements.clear()
        world.get(path)
        return len(statements)

    def fewest() -> int:
        world.app.state.process.galleries.refresh()
        return min(asked() for _ in range(3))  # this process looks for newer versions, too

    event.listen(world.store.catalog.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    alone = fewest()
    for number in range(5):
        world.post("/galleries", {"name": f"more-{number}", "model": "old"})
    assert fewest() == alone
    assert sum("FROM items" in statement for statement in statements) <= 2


def test_a_small_write_takes_three_transactions_and_to_read_an_item_takes_one(world: World) -> None:
    """One reads what the write must be, one writes, and one reads for searches; each waits for the database several times."""
    begun: list[object] = []

    def fewest(act: Callable[[], object]) -> int:
        """This process looks for newer versions, too."""
        found = []
        for _ in range(5):
            begun.clear()
            act()
            found.append(len(begun))
        return min(found)

    event.listen(world.store.catalog.engine, "checkout", lambda *given: begun.append(given))
    assert fewest(lambda: world.upsert({"id": "new", "embedding": [1, 1, 1, 1]})) == 3
    assert fewest(lambda: world.post(f"{ITEMS}/delete", {"ids": ["item-1"]})) == 2
    assert fewest(lambda: world.get(f"{ITEMS}/item-2")) == 1


def test_native_and_derived_items_are_counted_while_an_upgrade_runs(world: World) -> None:
    upgrade = world.start()
    world.work(steps=3)
    document = world.get(f"/galleries/{GALLERY}")
    assert document["active_upgrade"] == upgrade
    assert {c["model"]: (c["native_items"], c["derived_items"]) for c in document["columns"]} == {
        "old": (4, 0),
        "new": (0, 2),
    }


def test_an_upsert_is_seen_by_the_next_search_and_replaces_by_id(world: World) -> None:
    assert world.upsert({"id": "item-0", "embedding": [0, 0, 0, 2]}) == {"upserted": 1, "version": 5}
    answer = world.search([0, 0, 0, 2], k=1)
    assert answer["hits"] == [{"id": "item-0", "score": 0.0, "origin": "native"}]
    assert answer["served"]["gallery_version"] == 5
    assert world.get(f"/galleries/{GALLERY}")["items"] == 4


def test_vectors_may_come_as_base64(world: World) -> None:
    vector = base64.b64encode(np.array([0, 3, 0, 0], "<f4").tobytes()).decode()
    world.upsert({"id": "b64", "embedding": vector})
    body = {"model": "old", "vector": vector, "k": 1}
    assert world.post(f"/galleries/{GALLERY}/search", body)["hits"][0]["id"] == "b64"


def test_an_item_is_read_with_its_columns_and_their_makers(world: World) -> None:
    upgrade = world.upgraded()
    item = world.get(f"{ITEMS}/item-1")
    step = {
        "transformation": "old-to-new",
        "artifact_sha256": world.get("/transformations/old-to-new")["artifact"],
        "source_model": "old",
        "source_origin": "native",
        "computed_in": "float32",
    }
    assert item == {
        "id": "item-1",
        "payload": {"axis": 1, "even": False},
        "side_information": None,
        "columns": [
            {"model": "new", "origin": "derived", "transformation": "old-to-new", "lineage": [step], "vector": None},
            {"model": "old", "origin": "native", "transformation": None, "lineage": [], "vector": None},
        ],
    }
    vectors = [column["vector"] for column in world.get(f"{ITEMS}/item-1?include=vectors")["columns"]]
    assert vectors == [[0, 0, 1, 0, 0], [0, 1, 0, 0]]
    world.verb(upgrade, "rollback")
    assert [column["model"] for column in world.get(f"{ITEMS}/item-1")["columns"]] == ["old"]


def test_a_chain_of_upgrades_is_told_by_the_gallery_its_items_and_each_upgrade(world: World) -> None:
    world.model("newest", 3)
    world.transformation("new-to-newest", "new", "newest", "forward", linear(np.eye(3, 5)))
    first = world.upgraded()
    second = world.upgraded(transformation="new-to-newest")
    world.upsert({"id": "late", "embedding": [1, 2, 3, 4, 5]}, model="new")

    upgrade = world.upgrade(second)
    assert [each["transformation"] for each in upgrade["pinned"]] == ["new-to-newest"]
    assert (world.upgrade(first)["allowed"], upgrade["allowed"]) == (["finalize"], ["rollback", "finalize"])
    problem = world.refused(world.client.post(f"/admin/upgrades/{first}/rollback"), 409, "invalid_state_transition")
    assert problem["allowed"] == ["finalize"]

    (newest,) = [each for each in world.get(f"/galleries/{GALLERY}")["columns"] if each["model"] == "newest"]
    told = {
        each["items"]: [(step["transformation"], step["source_model"], step["source_origin"]) for step in each["steps"]]
        for each in newest["lineages"]
    }
    composed = [("old-to-new", "old", "native"), ("new-to-newest", "new", "derived")]
    assert told == {4: composed, 1: [("new-to-newest", "new", "native")]}
    columns = {each["model"]: each["lineage"] for each in world.get(f"{ITEMS}/item-0")["columns"]}
    assert {model: len(lineage) for model, lineage in columns.items()} == {"old": 0, "new": 1, "newest": 2}

    world.verb(second, "finalize")
    assert [world.upgrade(each)["state"] for each in (first, second)] == ["finalized", "finalized"]
    assert [each["model"] for each in world.get(f"/galleries/{GALLERY}")["columns"]] == ["newest"]


def test_vectors_that_were_computed_in_two_number_types_are_told_apart(
    tmp_path: Path, four_items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDFILL_COMPUTED_IN", "bfloat16")
    shutil.copytree(four_items, tmp_path / "data")
    with opened(tmp_path) as world:
        world.upsert(*({"id": f"many-{at}", "embedding": [1, 2, 3, at]} for at in range(64)))  # enough to tell by
        world.upgraded()
        world.upsert({"id": "late", "embedding": [1, 2, 3, 4]})
        (new,) = [each for each in world.get(f"/galleries/{GALLERY}")["columns"] if each["model"] == "new"]
        told = {each["steps"][0]["computed_in"]: each["items"] for each in new["lineages"]}
    assert told == {"bfloat16": 68, "float32": 1}


def test_an_id_may_be_any_text(world: World) -> None:
    from urllib.parse import quote

    signs = ["a\u200db", "a\u200cb", "a\xa0b", "a\u3000b", "a\xadb", "\ue000", "\u2028", "\U0001fae9", "\U000323b0"]
    names = ["a/b", "ä ö", "delete", "%", "日本", "...", ".a", *signs]
    world.upsert(*({"id": name, "embedding": [9, 9, 9, at]} for at, name in enumerate(names)))
    for at, name in enumerate(names):
        assert world.get(f"{ITEMS}/{quote(name, safe='')}")["id"] == name
        assert world.search([9, 9, 9, at], k=1)["hits"][0]["id"] == name


def test_deleted_items_are_gone_and_unknown_ids_are_reported(world: World) -> None:
    answer = world.post(f"{ITEMS}/delete", {"ids": ["item-0", "nobody", "item-0", "\0"]})
    assert answer == {"deleted": 1, "missing": ["nobody", "\0"]}
    assert [hit["id"] for hit in world.old_search(0)["hits"]] == ["item-1", "item-2", "item-3"]
    world.refused(world.client.get(f"{ITEMS}/item-0"), 404, "item_not_found")


def test_one_request_takes_items_with_and_without_side_information(empty: World) -> None:
    empty.model("old", OLD, side_information={"dimension": 2})
    empty.post("/galleries", {"name": GALLERY, "model": "old", "storage_dtype": "float16"})
    items = [{"id": str(at), "embedding": unit.tolist()} for at, unit in enumerate(UNITS)]
    items[1]["side_information"], items[3]["side_information"] = [1, 2], [3, 4]
    empty.upsert(*items)
    assert empty.get(f"/galleries/{GALLERY}")["side_information"]["items"] == 2
    sides = [empty.get(f"{ITEMS}/{at}?include=vectors")["side_information"] for at in range(4)]
    assert sides == [None, [1, 2], None, [3, 4]]
    items[3]["side_information"] = [3]
    problem = empty.refused(empty.client.post(ITEMS, json={"model": "old", "items": items}), 422, "dimension_mismatch")
    assert problem["errors"][0]["pointer"] == "/items/3/side_information"
    assert problem["item"] == "3"


def test_a_deleted_gallery_is_gone_and_its_upgrade_is_cancelled(world: World) -> None:
    upgrade = world.start()
    world.work(steps=2)
    assert world.client.delete(f"/galleries/{GALLERY}").status_code == 204
    world.refused(world.client.get(f"/galleries/{GALLERY}"), 404, "gallery_not_found")
    body = {"model": "old", "vector": [1, 0, 0, 0]}
    world.refused(world.client.post(f"/galleries/{GALLERY}/search", json=body), 404, "gallery_not_found")
    assert world.upgrade(upgrade)["state"] == "cancelled"
    assert not list((world.folder / "data" / "columns").glob("**/*.npy"))
    world.post("/galleries", {"name": GALLERY, "model": "old"})
    assert world.old_search(0)["hits"] == []


def test_limits_of_items_are_held_and_named(tmp_path: Path) -> None:
    with opened(tmp_path, gallery={"max_items_per_upsert": 2}) as world:
        world.prepared()
        items = [{"id": str(at), "embedding": [1, 0, 0, 0]} for at in range(3)]
        problem = world.refused(world.client.post(ITEMS, json={"model": "old", "items": items}), 422, "limit_exceeded")
        assert (problem["limit"], problem["maximum"]) == ("max_items_per_upsert", 2)
        assert world.get("/info")["limits"]["max_items_per_upsert"] == 2


def test_another_process_sees_a_write_within_a_second(world: World) -> None:
    """Both have the same store here, but each has its own snapshots."""
    from service.app import create_app
    from tests.service.world import served

    other = create_app(world.store)
    with served(other) as address:
        world.upsert({"id": "fresh", "embedding": [5, 5, 5, 5]})
        galleries = other.state.process.galleries
        wait_for(lambda: galleries.current.snapshot(GALLERY).version == 5, 1, lambda: "the write is not seen")
        world.post("/galleries", {"name": "second", "model": "old"})
        # What is not known yet is looked for at once.
        answer = world.client.post(f"{address}/galleries/second/search", json={"model": "old", "vector": [1, 0, 0, 0]})
        assert answer.status_code == 200


def test_probes_are_kept_and_measure_the_upgrade(world: World) -> None:
    probes = [
        {"vectors": {"old": unit.tolist(), "new": [0, *unit.tolist()]}, "relevant": [f"item-{at}"]}
        for at, unit in enumerate(UNITS)
    ]
    answer = world.client.put(f"/galleries/{GALLERY}/probes", json={"probes": probes})
    assert answer.json() == {"probes": 4}
    upgrade = world.start(gate={"min_cmc1": 0.9})
    world.work()
    quality = world.upgrade(upgrade)["quality"]
    assert quality["before"]["cmc1"] == quality["expected_after"]["cmc1"] == quality["now"]["cmc1"] == 1.0
    fractions = [point["fraction"] for point in quality["by_progress"]]
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    wrong = {"probes": [probes[0], {"vectors": {"old": [1.0]}}]}
    problem = world.refused(world.client.put(f"/galleries/{GALLERY}/probes", json=wrong), 422, "dimension_mismatch")
    assert problem["errors"][0]["pointer"] == "/probes/1/vectors/old"


def test_small_segments_are_merged_when_someone_asks(world: World) -> None:
    for at in range(3):
        world.upsert({"id": f"small-{at}", "embedding": [0, 0, 1, at]})
    before = world.get(f"/galleries/{GALLERY}")
    found = world.old_search(2)
    assert before["segments"] >= 3
    assert world.post(f"/admin/galleries/{GALLERY}/compact", status=202)["items"] == before["items"]
    Worker(world.store, WorkerSettings()).work()
    after = world.get(f"/galleries/{GALLERY}")
    assert after["segments"] < before["segments"]
    assert after["items"] == before["items"] == after["columns"][0]["native_items"]
    assert after["columns"][0]["bytes"] < before["columns"][0]["bytes"]  # a file has a header
    item = world.get(f"/galleries/{GALLERY}/items/small-1", params={"include": "vectors"})
    assert item["columns"][0]["vector"] == [0, 0, 1, 1]
    assert world.old_search(2)["hits"] == found["hits"]
    world.refused(world.client.post("/admin/galleries/nowhere/compact"), 404, "gallery_not_found")
