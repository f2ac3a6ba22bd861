"""Models, artifacts and transformations over REST."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import numpy as np
from sqlalchemy import event

from models.artifacts import save
from tests.service.world import NEW, OLD, UNITS, World, backward, forward, linear


def test_a_model_is_registered_once_and_read_back(empty: World) -> None:
    body = {
        "name": "resnet18-v1",
        "dimension": 512,
        "metric": "cosine",
        "normalized": True,
        "side_information": {"dimension": 64},
        "fingerprint": "sha256:5d0c",
        "description": "the old one",
    }
    answer = empty.client.post("/models", json=body)
    assert answer.status_code == 201
    assert answer.headers["location"] == "/models/resnet18-v1"
    expected = {**body, "galleries": [], "transformations": [], "created_at": answer.json()["created_at"]}
    assert answer.json() == expected
    assert answer.json()["created_at"].endswith("Z")
    assert empty.client.post("/models", json=body).status_code == 200
    assert empty.get("/models/resnet18-v1") == expected
    others: dict[str, Any] = {
        "dimension": 511,
        "metric": "euclidean",
        "normalized": False,
        "side_information": None,
        "fingerprint": "other",
        "description": None,
    }
    for field, other in others.items():
        problem = empty.refused(empty.client.post("/models", json={**body, field: other}), 409, "model_exists")
        assert f"registered with another {field};" in problem["detail"]
    assert empty.get("/models/resnet18-v1") == expected


def test_a_model_names_the_galleries_and_transformations_that_use_it(world: World) -> None:
    assert world.get("/models/old")["galleries"] == ["photos"]
    assert world.get("/models/old")["transformations"] == ["old-to-new"]
    assert world.get("/models/new")["galleries"] == []


def test_a_list_of_models_takes_as_many_statements_however_many_there_are(world: World) -> None:
    world.upgraded()
    asked: list[str] = []

    def listen(_c: object, _cursor: object, statement: str, *_: object) -> None:
        if threading.current_thread().name not in {"watch", "tell"}:
            asked.append(statement)

    def listed() -> tuple[int, list[tuple[str, list[str], list[str]]]]:
        asked.clear()
        models = world.get("/models")["models"]
        return len(asked), [(each["name"], each["galleries"], each["transformations"]) for each in models]

    event.listen(world.store.catalog.engine, "before_cursor_execute", listen)
    taken, of_two = listed()
    assert of_two == [("new", ["photos"], ["old-to-new"]), ("old", ["photos"], ["old-to-new"])]
    for at in range(9):
        world.model(f"other-{at}", OLD)
        world.post("/galleries", {"name": f"of-{at}", "model": f"other-{at}"})
    others = [(f"other-{at}", [f"of-{at}"], []) for at in range(9)]
    assert listed() == (taken, [*of_two, *others])


def test_transformations_are_registered_with_their_model_or_nothing_is(empty: World) -> None:
    empty.model("old", OLD)
    digest = empty.artifact(forward())
    transformation = {
        "name": "old-to-new",
        "source": "old",
        "target": "new",
        "direction": "forward",
        "method": "test",
        "artifact": digest,
    }
    body = {"name": "new", "dimension": NEW, "metric": "euclidean", "transformations": [transformation]}
    before = empty.everything()
    wrong = {
        **body,
        "transformations": [transformation, {**transformation, "name": "x", "source": "new", "target": "old"}],
    }
    problem = empty.refused(empty.client.post("/models", json=wrong), 422, "wrong_transformation")
    assert problem["errors"][0]["pointer"] == "/transformations/1/source"
    for field, value in (("artifact", "0" * 64), ("source", "nobody")):
        wrong = {**body, "transformations": [transformation, {**transformation, "name": "x", field: value}]}
        answer = empty.client.post("/models", json=wrong)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (404, f"/transformations/1/{field}")
    assert empty.everything() == before
    assert empty.client.post("/models", json=body).json()["transformations"] == ["old-to-new"]
    assert empty.client.post("/models", json=body).status_code == 200


def test_an_artifact_is_stored_once_under_its_digest(empty: World) -> None:
    digest = save(empty.folder / "a.safetensors", forward())
    content = (empty.folder / "a.safetensors").read_bytes()
    answer = empty.client.put(f"/artifacts/{digest}", content=content)
    assert answer.status_code == 201
    assert answer.json()["sha256"] == digest
    assert answer.json()["bytes"] == len(content)
    assert answer.json()["architecture"]["kind"] == "linear"
    assert answer.json()["architecture"]["side_dimension"] is None
    stored = empty.folder / "data" / "artifacts" / f"{digest}.safetensors"
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == digest
    before = empty.everything()
    assert empty.client.put(f"/artifacts/{digest}", content=content).status_code == 200
    assert empty.everything() == before


def test_an_artifact_may_be_larger_than_a_body(empty: World) -> None:
    empty.app.state.process.settings.max_body_bytes = 1000
    digest = save(empty.folder / "a.safetensors", linear(np.zeros((100, 100))))
    content = (empty.folder / "a.safetensors").read_bytes()
    assert empty.client.put(f"/artifacts/{digest}", content=content).status_code == 201
    empty.app.state.process.settings.max_artifact_bytes = len(content) - 1
    empty.refused(empty.client.put(f"/artifacts/{digest}", content=content), 413, "body_too_large")


def test_a_transformation_is_registered_once_and_read_back(world: World) -> None:
    known = world.get("/transformations/old-to-new")
    assert known["source"] == "old"
    assert known["evaluation"] is None
    body = {name: known[name] for name in ("name", "source", "target", "direction", "method", "artifact")}
    assert world.client.post("/transformations", json=body).status_code == 200
    other = world.client.post("/transformations", json={**body, "method": "x", "direction": "backward"})
    problem = world.refused(other, 409, "transformation_exists")
    assert "registered with another direction, method;" in problem["detail"]
    missing = {**body, "name": "y", "artifact": "0" * 64}
    world.refused(world.client.post("/transformations", json=missing), 404, "artifact_not_found")
    assert world.get("/transformations")["transformations"] == [known]


def test_a_transformation_is_evaluated_on_pairs_and_keeps_the_result(world: World) -> None:
    exact = np.hstack([np.zeros((OLD, 1)), UNITS])
    body = {"source_embeddings": UNITS.tolist(), "target_embeddings": exact.tolist(), "labels": ["a", "a", "b", "b"]}
    answer = world.post("/transformations/old-to-new/evaluate", body)
    evaluation = answer["evaluation"]
    assert evaluation["mean_cosine"] == 1.0
    assert evaluation["mean_squared_error"] == 0.0
    assert evaluation["neighbour_recall"] == 1.0
    assert evaluation["pairs"] == evaluation["known_answers"]["pairs"] == 4
    assert {"cmc1", "cmc5", "map"} <= evaluation.keys()
    assert world.get("/transformations/old-to-new") == answer
    short = {**body, "target_embeddings": exact[:2].tolist()}
    problem = world.refused(
        world.client.post("/transformations/old-to-new/evaluate", json=short), 422, "dimension_mismatch"
    )
    assert problem["errors"][0]["pointer"] == "/target_embeddings"


def test_lists_come_in_pages(empty: World) -> None:
    for at in range(5):
        empty.model(f"model-{at}", 2)
    seen, token = [], None
    while True:
        page = empty.get("/models", params={"page_size": 2, **({"page_token": token} if token else {})})
        seen.append([model["name"] for model in page["models"]])
        token = page["next_page_token"]
        if token is None:
            break
    assert seen == [["model-0", "model-1"], ["model-2", "model-3"], ["model-4"]]
    assert len(empty.get("/models", params={"page_size": 10**12})["models"]) == 5


def test_paging_without_values_gives_the_first_page(empty: World) -> None:
    """Which is how httpx writes a size and a token that are null."""
    empty.model("only", 2)
    assert empty.get("/models", params={"page_size": None, "page_token": None}) == empty.get("/models")


def test_another_transformation_of_the_same_artifact_is_another(world: World) -> None:
    world.transformation("new-to-old", "new", "old", "backward", backward())
    names = [each["name"] for each in world.get("/transformations")["transformations"]]
    assert names == ["new-to-old", "old-to-new"]
