"""`search/explain` over REST, by the client, and from the command line."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from forwardfill import remote
from forwardfill.client import Client
from tests.service.world import GALLERY, UNITS, World

EXPLAIN = f"/galleries/{GALLERY}/search/explain"
QUERY = np.array([0.0, *UNITS[1]], np.float32)


@pytest.fixture
def halfway(world: World) -> World:
    """Half of the segments have arrived."""
    world.start()
    world.work(steps=3)
    return world


def encoded(vector: Any) -> str:
    return base64.urlsafe_b64encode(np.asarray(vector, "<f4").tobytes()).decode().rstrip("=")


def untimed(told: Any) -> Any:
    """What does not depend on the clock."""
    for shelf in told["plan"]["shelves"]:
        assert shelf.pop("ask_ms") >= 0
    assert sum(told.pop("milliseconds").values()) == pytest.approx(told.pop("took_ms"), abs=0.01)
    assert told["exact"].pop("took_ms") > 0
    return told


def test_a_search_tells_its_plan_its_recall_and_where_its_time_went(halfway: World) -> None:
    search = halfway.new_search(1, k=2, include=["payload"])
    body = {"model": "new", "vector": QUERY.tolist(), "companions": {"old": UNITS[1].tolist()}, "k": 2}
    told = untimed(halfway.post(EXPLAIN, {**body, "include": ["payload"]}))
    assert (told["hits"], told["served"]) == (search["hits"], search["served"])
    assert told["exact"]["hits"] == search["hits"]
    assert told["exact"]["recall"] == {"hits": 2, "found": 2, "recall": 1.0}
    assert told["exact"]["largest_score_difference"] == 0
    direct, forward = told["plan"]["shelves"]
    assert (direct["route"], direct["column"], direct["transformations"]) == ("direct", "new", [])
    assert (forward["route"], forward["column"], forward["transformations"]) == ("forward", "old", ["old-to-new"])
    assert forward["index"]["kind"] == "flat"
    assert (len(forward["segments"]), forward["rows"], forward["live"], forward["candidates"]) == (2, 2, 2, 2)
    asked = {
        "model": "new",
        "vector": encoded(QUERY),
        "companions": json.dumps({"old": base64.b64encode(UNITS[1].tobytes()).decode()}),
        "k": "2",
    }
    by_url = untimed(halfway.get(EXPLAIN, params=asked))
    for hits in (told["hits"], told["exact"]["hits"]):
        for hit in hits:
            del hit["payload"]
    assert by_url == told
    fewer = halfway.get(EXPLAIN, params={**asked, "filter": '{"axis": {"gte": 2}}'})
    assert {hit["id"] for hit in fewer["exact"]["hits"]} == {"item-2", "item-3"}

    with Client(str(halfway.client.base_url)) as client:
        by_client = client.explain(GALLERY, "new", QUERY, companions={"old": UNITS[1]}, k=2)
    assert untimed(by_client) == told


def test_the_command_shows_each_shelf_and_the_recall(
    halfway: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDFILL_URL", str(halfway.client.base_url))
    monkeypatch.setattr(remote.console, "width", 200)
    np.save(tmp_path / "new.npy", QUERY)
    np.save(tmp_path / "old.npy", UNITS[1])
    asked = ["explain", GALLERY, "--model", "new", "--vector", str(tmp_path / "new.npy")]
    shown = CliRunner().invoke(remote.galleries, [*asked, "--companion", f"old={tmp_path / 'old.npy'}"])
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("forward") == 2  # a shelf, and its recall
    assert "recall" in shown.output
    refused = CliRunner().invoke(remote.galleries, [*asked, "--companion", "old"])
    assert refused.exit_code == 2


def test_what_cannot_be_asked_is_refused_as_a_search_would_be(world: World) -> None:
    asked = {"model": "old", "vector": encoded(UNITS[0])}
    for changed, status, code, pointer in [
        ({"vector": "?"}, 422, "invalid_vector", "/vector"),
        ({"vector": encoded([1.0])}, 422, "dimension_mismatch", "/vector"),
        ({"filter": "{"}, 422, "invalid_request", "/filter"),
        ({"companions": "[]"}, 422, "invalid_request", "/companions"),
        ({"companions": '{"new": 1}'}, 422, "invalid_vector", "/companions/new"),
        ({"k": "1001"}, 422, "limit_exceeded", "/k"),
        ({"k": "0"}, 422, "invalid_request", "/k"),
        ({"model": "nobody"}, 404, "model_not_found", None),
    ]:
        problem = world.refused(world.client.get(EXPLAIN, params={**asked, **changed}), status, code)
        assert pointer is None or problem["errors"][0]["pointer"] == pointer
    world.refused(world.client.get("/galleries/none/search/explain", params=asked), 404, "gallery_not_found")
