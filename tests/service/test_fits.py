"""A transformation is fitted over REST: asked for, done by a worker, registered with its verdict, or refused by name."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest

from models import fitting
from models.methods import METHODS
from service.api.fits import Method
from tests.service.test_arrow import TYPE, fixed, stream
from tests.service.world import GALLERY, NEW, OLD, World, opened
from workers.settings import WorkerSettings
from workers.tasks import Worker

FIT = "/transformations/fit"
ITEMS = 80
IDS = [f"item-{at}" for at in range(ITEMS)]
HIDDEN = np.random.default_rng(0).normal(size=(ITEMS, 3)).astype(np.float32)
LABELS = [int(row) for row in np.argmax(HIDDEN, axis=1)]
#: the old model sees little of what there is, the new one all of it
OLD_VECTORS = np.pad(HIDDEN + np.random.default_rng(1).normal(0, 0.3, HIDDEN.shape), ((0, 0), (0, OLD - 3)))
NEW_VECTORS = np.pad(HIDDEN, ((0, 0), (0, NEW - 3)))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A gallery of the old model, and the new model; no transformation between them."""
    with opened(tmp_path) as opened_world:
        opened_world.model("old", OLD)
        opened_world.model("new", NEW)
        opened_world.post("/galleries", {"name": GALLERY, "model": "old"})
        items = [{"id": each, "embedding": row.tolist()} for each, row in zip(IDS, OLD_VECTORS, strict=True)]
        opened_world.upsert(*items[:30])
        opened_world.upsert(*items[30:])
        yield opened_world


def pairs(count: int = ITEMS, *, labelled: bool = True) -> list[dict[str, Any]]:
    vectors = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in NEW_VECTORS[:count]]
    made: list[dict[str, Any]] = [{"id": i, "embedding": v} for i, v in zip(IDS, vectors, strict=False)]
    if labelled:
        for pair, label in zip(made, LABELS, strict=False):
            pair["label"] = label
    return made


def body(**more: Any) -> dict[str, Any]:
    return {"gallery": GALLERY, "name": "fitted", "target": "new", "method": "affine", "pairs": pairs(), **more}


def work(world: World) -> None:
    """All that a worker does."""
    Worker(world.store, WorkerSettings()).work()
    world.app.state.process.galleries.refresh()


def pair_files(world: World) -> list[Path]:
    return list((world.store.files.root / "fits").glob("*"))


def test_a_sample_becomes_a_transformation_with_a_verdict_and_the_gallery_can_be_upgraded_by_it(world: World) -> None:
    answer = world.client.post(FIT, json=body())
    assert answer.status_code == 202
    started = answer.json()
    assert (started["state"], started["source_model"], started["pairs"]) == ("pending", "old", ITEMS)
    assert answer.headers["location"] == f"/transformations/fits/{started['id']}"
    assert len(world.nudges) == 1
    assert len(pair_files(world)) == 3

    work(world)
    done = world.get(answer.headers["location"])
    assert (done["state"], done["error"], done["progress"]) == ("completed", None, {"fraction": 1.0, "method": None})
    assert sum(done["parts"].values()) == ITEMS
    verdict = done["verdict"]
    assert verdict["decision"] in ("upgrade", "fuse", "stay")
    gain = verdict["differences"]["upgrade - stay"]["cmc1"]
    assert gain["low"] <= gain["difference"] <= gain["high"]
    assert [candidate["method"] for candidate in done["candidates"]] == ["affine"]
    assert done["warnings"]  # these are few pairs, and it says so
    assert pair_files(world) == []
    assert world.get("/transformations/fits")["fits"] == [done]

    registered = world.get("/transformations/fitted")
    assert (registered["source"], registered["target"], registered["method"]) == ("old", "new", "affine")
    assert registered["artifact"] == done["artifact"]
    assert registered["evaluation"]["verdict"]["decision"] == verdict["decision"]
    assert registered["evaluation"]["fit"] == done["id"]

    upgrade = world.post("/admin/upgrades", {"gallery": GALLERY, "transformation": "fitted"})["id"]
    work(world)
    assert world.upgrade(upgrade)["state"] == "completed"
    found = world.search(NEW_VECTORS[0], "new", k=1)
    assert (found["served"]["routes"]["direct"], len(found["hits"])) == (ITEMS, 1)


def test_a_fit_that_names_no_method_tries_all_that_pairs_are_enough_for_and_takes_one_of_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"affine", "procrustes"}  # of all, that these take least long to train
    monkeypatch.setattr(fitting, "trainable", lambda: {name: METHODS[name] for name in sorted(quick)})
    asked = {name: value for name, value in body().items() if name != "method"}
    fit = world.client.post(FIT, json=asked).json()["id"]
    work(world)
    done = world.get(f"/transformations/fits/{fit}")
    assert (done["state"], done["error"], done["progress"]["fraction"]) == ("completed", None, 1.0)
    assert {candidate["method"] for candidate in done["candidates"]} == quick
    assert world.get("/transformations/fitted")["method"] in quick


def test_a_stream_is_fitted_like_json(world: World) -> None:
    content = stream({"id": IDS, "embedding": fixed(NEW_VECTORS), "label": LABELS})
    params = {"gallery": GALLERY, "name": "from-arrow", "target": "new", "method": "affine", "seed": 3}
    streamed = world.client.post(FIT, content=content, headers=TYPE, params=params)
    assert streamed.status_code == 202, streamed.text
    world.post(FIT, body(name="from-json", seed=3))
    work(world)
    one, other = world.get("/transformations/fits")["fits"]
    assert one["state"] == other["state"] == "completed"
    assert one["artifact"] == other["artifact"]
    assert one["verdict"] == other["verdict"]


def test_a_stream_may_encode_its_ids_and_have_labels_of_nulls_only(world: World) -> None:
    ids, no_labels = pa.array(IDS).dictionary_encode(), pa.nulls(len(IDS))
    content = stream({"id": ids, "embedding": fixed(NEW_VECTORS), "label": no_labels})
    params = {"gallery": GALLERY, "name": "from-arrow", "target": "new"}
    streamed = world.client.post(FIT, content=content, headers=TYPE, params=params)
    assert (streamed.status_code, streamed.json()["pairs"]) == (202, len(IDS))


def test_a_map_of_queries_is_registered_the_other_way_round(world: World) -> None:
    world.post(FIT, body(direction="backward", pairs=pairs(labelled=False)))
    work(world)
    registered = world.get("/transformations/fitted")
    assert (registered["source"], registered["target"], registered["direction"]) == ("new", "old", "backward")
    (done,) = world.get("/transformations/fits")["fits"]
    assert done["verdict"]["assumption"].startswith("there are no usable labels")
    routes = world.search(NEW_VECTORS[0], "new")["served"]["routes"]
    assert routes["direct"] == ITEMS  # the query was mapped back


def test_the_same_request_with_the_same_key_starts_nothing_new(world: World) -> None:
    key = {"idempotency-key": "once"}
    first = world.post(FIT, body(), headers=key)
    assert world.post(FIT, body(), headers=key) == first
    assert len(pair_files(world)) == 3
    world.refused(world.client.post(FIT, json=body(seed=1), headers=key), 422, "idempotency_key_reused")


def test_a_fit_can_be_cancelled_until_it_has_ended(world: World) -> None:
    started = world.post(FIT, body())
    cancel = f"/transformations/fits/{started['id']}/cancel"
    assert world.post(cancel, status=202)["state"] == "cancelled"
    assert world.post(cancel, status=200)["state"] == "cancelled"
    assert pair_files(world) == []
    work(world)
    assert world.get("/transformations")["transformations"] == []
    again = world.post(FIT, body())  # the name is free
    work(world)
    problem = world.refused(
        world.client.post(f"/transformations/fits/{again['id']}/cancel"), 409, "invalid_state_transition"
    )
    assert problem["allowed"] == []
    world.refused(world.client.post("/transformations/fits/none/cancel"), 404, "fit_not_found")


def changed(at: int, **fields: Any) -> list[dict[str, Any]]:
    made = pairs()
    made[at].update(fields)
    return [{name: value for name, value in pair.items() if value is not ...} for pair in made]


BAD: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"gallery": "nowhere"}, 404, "gallery_not_found", None),
    ({"target": "nobody"}, 404, "model_not_found", None),
    ({"target": "old", "pairs": changed(0)[:0]}, 422, "invalid_request", "/pairs"),
    ({"pairs": pairs(9)}, 422, "unusable_pairs", "/pairs"),
    ({"pairs": changed(4, id="nobody")}, 404, "item_not_found", "/pairs/4/id"),
    ({"pairs": changed(4, id="item-0")}, 422, "duplicate_id", "/pairs/4/id"),
    ({"pairs": changed(4, embedding=[1.0, 2.0])}, 422, "dimension_mismatch", "/pairs/4/embedding"),
    ({"pairs": changed(4, embedding=[1.0, "x"])}, 422, "invalid_vector", "/pairs/4/embedding"),
    (
        {"pairs": changed(4, embedding=base64.b64encode(np.full(NEW, np.nan, "<f4").tobytes()).decode())},
        422,
        "invalid_vector",
        "/pairs/4/embedding",
    ),
    ({"pairs": changed(4, label=...)}, 422, "invalid_item", "/pairs/4/label"),
    ({"method": "magic"}, 422, "invalid_request", "/method"),
    ({"name": "taken"}, 409, "transformation_exists", "/name"),
    ({"name": "wanted"}, 409, "transformation_exists", "/name"),
    ({"name": "fits"}, 422, "invalid_request", "/name"),
    ({"use_side_information": True}, 422, "missing_side_information", "/pairs/0/id"),
]


def test_what_cannot_be_fitted_is_refused_by_name_and_nothing_changes(world: World) -> None:
    world.post(FIT, body(name="taken"))
    work(world)
    world.post(FIT, body(name="wanted"))
    before = world.everything()
    for more, status, code, pointer in BAD:
        problem = world.refused(world.client.post(FIT, json=body(**more)), status, code)
        if pointer is not None:
            assert problem["errors"][0]["pointer"] == pointer, problem
        if code == "item_not_found":
            assert problem["missing"] == ["nobody"]
    vectors = [row.tolist() for row in OLD_VECTORS[:10]]
    same = [{"id": each, "embedding": row} for each, row in zip(IDS, vectors, strict=False)]
    world.refused(world.client.post(FIT, json=body(target="old", pairs=same)), 422, "same_model")
    content = stream({"id": IDS[:10], "embedding": fixed(NEW_VECTORS[:10])})
    problem = world.refused(world.client.post(FIT, content=content, headers=TYPE), 422, "invalid_request")
    assert {each["pointer"] for each in problem["errors"]} == {"/gallery", "/name", "/target"}
    params = {"gallery": GALLERY, "name": "x", "target": "new"}
    unlabelled = stream({"id": IDS[:10], "embedding": fixed(NEW_VECTORS[:10]), "label": [None, *LABELS[1:10]]})
    answer = world.client.post(FIT, content=unlabelled, headers=TYPE, params=params)
    assert world.refused(answer, 422, "invalid_item")["errors"][0]["pointer"] == "/pairs/0/label"
    assert world.everything() == before


def test_more_pairs_than_the_limit_are_refused_in_both_forms(tmp_path: Path) -> None:
    with opened(tmp_path, gallery={"max_fit_pairs": 9}) as world:
        world.prepared()
        assert world.get("/info")["limits"]["max_fit_pairs"] == 9
        problem = world.refused(world.client.post(FIT, json=body(pairs=pairs(10))), 422, "limit_exceeded")
        assert problem["limit"] == "max_fit_pairs"
        content = stream({"id": IDS[:10], "embedding": fixed(NEW_VECTORS[:10])})
        params = {"gallery": GALLERY, "name": "x", "target": "new"}
        answer = world.client.post(FIT, content=content, headers=TYPE, params=params)
        assert world.refused(answer, 422, "limit_exceeded")["limit"] == "max_fit_pairs"


def test_the_methods_that_are_offered_are_those_that_pairs_are_enough_for() -> None:
    from models.fitting import AUTO, trainable

    assert get_args(Method) == (AUTO, *trainable())


def test_what_a_fit_advises_against_is_used_only_where_it_is_named(world: World) -> None:
    asked = {"model": "new", "vector": NEW_VECTORS[0].tolist()}
    unrelated = np.random.default_rng(9).normal(size=NEW_VECTORS.shape).astype("<f4")
    sent = [{**pair, "embedding": row.tolist()} for pair, row in zip(pairs(), unrelated, strict=True)]
    done = world.post(FIT, body(name="useless", pairs=sent))["id"]
    work(world)
    assert world.get(f"/transformations/fits/{done}")["verdict"]["decision"] == "stay"
    world.refused(world.client.post(f"/galleries/{GALLERY}/search", json=asked), 409, "no_route")
    started = world.client.post("/admin/upgrades", json={"gallery": GALLERY, "target_model": "new"})
    assert (
        "useless, of which the fit said that it gains nothing by itself"
        in world.refused(started, 422, "wrong_transformation")["detail"]
    )
    world.post("/admin/upgrades", {"gallery": GALLERY, "transformation": "useless"})
