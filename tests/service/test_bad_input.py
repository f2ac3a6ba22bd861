"""What cannot be right is refused with a problem that names it, and changes nothing."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from models.artifacts import save
from tests.service.world import GALLERY, OLD, World, backward, linear, opened

ITEMS = f"/galleries/{GALLERY}/items"
SEARCH = f"/galleries/{GALLERY}/search"
UNIT = [1.0, 0.0, 0.0, 0.0]
NAN = float("nan")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One world for all these tests, which is possible because none of them may change it."""
    with opened(tmp_path_factory.mktemp("shared")) as world:
        world.prepared().filled().model("twin", OLD)
        yield world


@pytest.fixture
def unchanged(shared: World) -> Iterator[World]:
    """A world that must be the same after the test, to the last byte."""
    before = shared.everything()
    yield shared
    assert shared.everything() == before


def items(*embeddings: Any, model: str = "old") -> dict[str, Any]:
    return {"model": model, "items": [{"id": f"new-{at}", "embedding": each} for at, each in enumerate(embeddings)]}


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "pointer"),
    [
        (ITEMS, items(UNIT, [1.0, 0.0]), 422, "dimension_mismatch", "/items/1/embedding"),
        (ITEMS, items(UNIT, []), 422, "dimension_mismatch", "/items/1/embedding"),
        (ITEMS, items(UNIT, [1.0, 0.0, 0.0, True]), 422, "invalid_vector", "/items/1/embedding"),
        (ITEMS, items(UNIT, [1.0, 0.0, 0.0, "0"]), 422, "invalid_vector", "/items/1/embedding"),
        (ITEMS, items(UNIT, [1.0, 0.0, 0.0, None]), 422, "invalid_vector", "/items/1/embedding"),
        (ITEMS, items(UNIT, [1.0, 0.0, 0.0, 1e39]), 422, "invalid_vector", "/items/1/embedding"),
        (ITEMS, items(UNIT, "not base64!"), 422, "invalid_vector", "/items/1/embedding"),
        (ITEMS, items(UNIT, "AAAAAAA="), 422, "invalid_vector", "/items/1/embedding"),
        (ITEMS, items(UNIT, 7), 422, "invalid_vector", "/items/1/embedding"),
        (ITEMS, items(UNIT, model="nobody"), 404, "model_not_found", "/model"),
        (ITEMS, items(UNIT, model="new"), 422, "dimension_mismatch", "/items/0/embedding"),
        (ITEMS, items([0.0, *UNIT], model="new"), 409, "no_route", "/model"),
        (ITEMS, items(), 422, "invalid_item", "/items"),
        (ITEMS, {}, 422, "invalid_request", "/model"),
        (ITEMS, [], 422, "invalid_request", ""),
        (ITEMS, {**items(UNIT), "colour": 1}, 422, "invalid_request", "/colour"),
        (ITEMS, {"model": "old", "items": [{"id": "a"}]}, 422, "invalid_request", "/items/0/embedding"),
        (ITEMS, {"model": "old", "items": [{"id": "", "embedding": UNIT}]}, 422, "invalid_item", "/items/0/id"),
        (ITEMS, {"model": "old", "items": [{"id": 7, "embedding": UNIT}]}, 422, "invalid_request", "/items/0/id"),
        (ITEMS, {"model": "old", "items": [{"id": "a", "embedding": UNIT}] * 2}, 422, "duplicate_id", "/items/1/id"),
        (
            ITEMS,
            {"model": "old", "items": [{"id": "a", "embedding": UNIT, "payload": [1]}]},
            422,
            "invalid_request",
            "/items/0/payload",
        ),
        (
            ITEMS,
            {"model": "old", "items": [{"id": "a", "embedding": UNIT, "payload": {"a": "\0"}}]},
            422,
            "invalid_item",
            "/items/0/payload",
        ),
        (
            ITEMS,
            {"model": "old", "items": [{"id": "a", "embedding": UNIT, "side_information": [1.0]}]},
            422,
            "dimension_mismatch",
            "/items/0/side_information",
        ),
        ("/galleries/nowhere/items", items(UNIT), 404, "gallery_not_found", None),
        (SEARCH, {"model": "old", "vector": [1.0]}, 422, "dimension_mismatch", "/vector"),
        (SEARCH, {"model": "old", "vector": [1.0, False, 0, 0]}, 422, "invalid_vector", "/vector"),
        (SEARCH, {"vector": UNIT}, 422, "invalid_request", "/model"),
        (SEARCH, {"model": "nobody", "vector": UNIT}, 404, "model_not_found", "/model"),
        (SEARCH, {"model": "NoBody!", "vector": UNIT}, 404, "model_not_found", "/model"),
        (SEARCH + "/batch", {"model": "nobody", "queries": [UNIT]}, 404, "model_not_found", "/model"),
        (SEARCH, {"model": "new", "vector": [0.0, *UNIT]}, 409, "no_route", None),
        (SEARCH, {"model": "twin", "vector": UNIT}, 409, "no_route", None),
        (ITEMS, items(UNIT, model="twin"), 409, "no_route", "/model"),
        (SEARCH, {"model": "old", "vector": UNIT, "k": 0}, 422, "invalid_request", "/k"),
        (SEARCH, {"model": "old", "vector": UNIT, "k": "3"}, 422, "invalid_request", "/k"),
        (SEARCH, {"model": "old", "vector": UNIT, "k": 1001}, 422, "limit_exceeded", "/k"),
        (SEARCH, {"model": "old", "vector": UNIT, "include": ["everything"]}, 422, "invalid_request", "/include/0"),
        (
            SEARCH,
            {"model": "old", "vector": UNIT, "companions": {"x/y": [1]}},
            404,
            "model_not_found",
            "/companions/x~1y",
        ),
        (
            SEARCH + "/batch",
            {"model": "old", "queries": [{"vector": UNIT, "companions": {"{x/y}": [1]}}]},
            404,
            "model_not_found",
            "/queries/0/companions/{x~1y}",
        ),
        (
            SEARCH,
            {"model": "old", "vector": UNIT, "companions": {"new": [1]}},
            422,
            "dimension_mismatch",
            "/companions/new",
        ),
        (
            SEARCH,
            {"model": "old", "vector": UNIT, "filter": {"a": {"near": 1}}},
            422,
            "invalid_filter",
            "/filter/a/near",
        ),
        (SEARCH, {"model": "old", "vector": UNIT, "filter": {"a": [1]}}, 422, "invalid_filter", "/filter/a"),
        (
            SEARCH,
            {"model": "old", "vector": UNIT, "filter": {"or": [{"a": at} for at in range(1000)]}},
            422,
            "invalid_filter",
            "/filter/or/128/a",
        ),
        (
            SEARCH,
            {"model": "old", "vector": UNIT, "filter": {"a": {"in": list(range(10_001))}}},
            422,
            "invalid_filter",
            "/filter/a/in",
        ),
        (SEARCH, {"model": "old", "vector": UNIT, "filter": {"a": "\0"}}, 422, "invalid_request", "/filter"),
        (SEARCH, {"model": "old", "vector": UNIT, "filter": []}, 422, "invalid_request", "/filter"),
        ("/galleries/nowhere/search", {"model": "old", "vector": UNIT}, 404, "gallery_not_found", None),
        (SEARCH + "/batch", {"model": "old", "queries": []}, 422, "invalid_request", "/queries"),
        (SEARCH + "/batch", {"model": "old", "queries": [UNIT] * 1001}, 422, "limit_exceeded", "/queries"),
        (
            SEARCH + "/batch",
            {"model": "old", "queries": [UNIT, {"vector": UNIT, "companions": {"new": [0.0, *UNIT]}}]},
            422,
            "invalid_request",
            "/queries/1/companions",
        ),
        ("/models", {"name": "Old", "dimension": 4, "metric": "cosine"}, 422, "invalid_request", "/name"),
        ("/models", {"name": "../x", "dimension": 4, "metric": "cosine"}, 422, "invalid_request", "/name"),
        ("/models", {"name": "x", "dimension": 0, "metric": "cosine"}, 422, "invalid_request", "/dimension"),
        ("/models", {"name": "x", "dimension": 8193, "metric": "cosine"}, 422, "limit_exceeded", "/dimension"),
        ("/models", {"name": "x", "dimension": 4, "metric": "hamming"}, 422, "invalid_request", "/metric"),
        ("/models", {"name": "old", "dimension": 5, "metric": "euclidean"}, 409, "model_exists", None),
        ("/galleries", {"name": "photos", "model": "old"}, 409, "gallery_exists", "/name"),
        ("/galleries", {"name": "x", "model": "nobody"}, 404, "model_not_found", "/model"),
        ("/galleries", {"name": "x", "model": "old", "index": {"kind": "magic"}}, 422, "invalid_index", "/index"),
        (
            "/galleries",
            {"name": "x", "model": "old", "storage_dtype": "int8"},
            422,
            "invalid_request",
            "/storage_dtype",
        ),
        ("/admin/upgrades", {"gallery": GALLERY}, 422, "invalid_request", "/transformation"),
        ("/admin/upgrades", {"gallery": "nowhere", "target_model": "new"}, 404, "gallery_not_found", "/gallery"),
        (
            "/admin/upgrades",
            {"gallery": GALLERY, "transformation": "none"},
            404,
            "transformation_not_found",
            "/transformation",
        ),
        ("/admin/upgrades", {"gallery": GALLERY, "target_model": "none"}, 404, "model_not_found", "/target_model"),
        ("/admin/upgrades", {"gallery": GALLERY, "target_model": "old"}, 422, "same_model", "/target_model"),
        (
            "/admin/upgrades",
            {"gallery": GALLERY, "target_model": "new", "order": "uncertainty"},
            422,
            "wrong_transformation",
            "/order",
        ),
        (
            "/admin/upgrades",
            {"gallery": GALLERY, "target_model": "new", "throttle": {"duty_cycle": 1.5}},
            422,
            "invalid_request",
            "/throttle/duty_cycle",
        ),
        (
            "/admin/upgrades",
            {"gallery": GALLERY, "target_model": "new", "throttle": {"items_per_second": 0}},
            422,
            "invalid_request",
            "/throttle/items_per_second",
        ),
        (
            "/admin/upgrades",
            {"gallery": GALLERY, "target_model": "new", "gate": {"min_luck": 0.5}},
            422,
            "invalid_request",
            "/gate/min_luck",
        ),
    ],
)
def test_a_bad_body_is_refused_by_name(
    unchanged: World, path: str, body: Any, status: int, code: str, pointer: str | None
) -> None:
    problem = unchanged.refused(unchanged.client.post(path, json=body), status, code)
    if pointer is not None:
        assert problem["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"name": "Old", "dimension": 4, "metric": "cosine"}, "begins with a letter or a digit"),
        ({"name": "x\n", "dimension": 4, "metric": "cosine"}, "a name is 1 to 63 of a-z"),
        ({"name": "x", "metric": "cosine"}, "/dimension: this field is required"),
        ({"name": "x", "dimension": 4, "metric": "cosine", "colour": 1}, "/colour: there is no such field here"),
        ({"name": "x", "dimension": 4, "metric": "cosine", "normalized": 1}, "/normalized: should be true or false"),
        ({"name": 7, "dimension": 4, "metric": "cosine"}, "/name: should be a string"),
        ([], "the body: should be a JSON object"),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(unchanged: World, body: Any, says: str) -> None:
    problem = unchanged.refused(unchanged.client.post("/models", json=body), 422, "invalid_request")
    assert says in problem["detail"]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (SEARCH, {"model": "old", "vector": UNIT, "filter": {"a": "\0"}}, "/filter: should be text without NUL"),
        ("/transformations/fit", {"name": "fits"}, "/name: `fits` is where fits are listed; choose another name"),
    ],
)
def test_what_we_refuse_ourselves_is_said_as_we_wrote_it(unchanged: World, path: str, body: Any, says: str) -> None:
    problem = unchanged.refused(unchanged.client.post(path, json=body), 422, "invalid_request")
    assert any(f"{each['pointer']}: {each['detail']}".startswith(says) for each in problem["errors"])
    assert "Value error" not in str(problem)


@pytest.mark.parametrize(
    ("path", "body", "pointer", "says"),
    [
        (
            "/transformations/fit",
            {"gallery": GALLERY, "name": "t", "target": "new", "pairs": [{"id": "a", "embedding": UNIT, "label": 1.5}]},
            "/pairs/0/label",
            "a label is a text or a whole number",
        ),
        (
            "/transformations/t/evaluate",
            {"source_embeddings": [UNIT], "target_embeddings": [UNIT], "labels": [True]},
            "/labels/0",
            "a label is a text or a whole number",
        ),
        (
            SEARCH,
            {"model": "old", "vector": UNIT, "companions": {"": UNIT}},
            "/companions/",
            "String should have at least 1 character",
        ),
        (SEARCH, {"model": "", "vector": UNIT}, "/model", "String should have at least 1 character"),
        (
            "/models",
            {"name": "x", "dimension": 4, "metric": "cosine", "fingerprint": "x" * 513},
            "/fingerprint",
            "String should have at most 512 characters",
        ),
    ],
)
def test_what_is_wrong_has_a_place_in_the_body_and_is_said_of_what_stands_there(
    unchanged: World, path: str, body: Any, pointer: str, says: str
) -> None:
    problem = unchanged.refused(unchanged.client.post(path, json=body), 422, "invalid_request")
    assert problem["errors"] == [{"pointer": pointer, "detail": says}]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ([1.0], "dimension_mismatch"),
        ([1e39, 0.0, 0, 0], "invalid_vector"),
        (["x", 0, 0, 0], "invalid_vector"),
        (None, "invalid_vector"),
        (UNIT, "invalid_request"),  # it lacks the first query's companion
    ],
)
def test_a_query_of_a_batch_that_is_a_vector_alone_is_pointed_at_as_it_was_sent(
    unchanged: World, query: Any, code: str
) -> None:
    with_companion = {"vector": UNIT, "companions": {"new": [0.0, *UNIT]}}
    first = with_companion if query is UNIT else {"vector": UNIT}
    answer = unchanged.client.post(f"{SEARCH}/batch", json={"model": "old", "queries": [first, query]})
    assert unchanged.refused(answer, 422, code)["errors"][0]["pointer"] == "/queries/1"
    answer = unchanged.client.post(
        f"{SEARCH}/batch", json={"model": "old", "queries": [{"vector": UNIT}, {"vector": [1.0]}]}
    )
    assert unchanged.refused(answer, 422, "dimension_mismatch")["errors"][0]["pointer"] == "/queries/1/vector"


def test_a_transformation_of_what_is_not_there_names_the_field(unchanged: World) -> None:
    known = unchanged.get("/transformations/old-to-new")
    body = {name: known[name] for name in ("source", "target", "direction", "method", "artifact")}
    for field, wrong in (("source", "nobody"), ("target", "nobody"), ("artifact", "0" * 64)):
        answer = unchanged.client.post("/transformations", json={"name": "x", **body, field: wrong})
        assert answer.status_code == 404
        assert answer.json()["errors"][0]["pointer"] == f"/{field}"


def test_a_probe_of_a_model_that_is_not_there_names_its_place(unchanged: World) -> None:
    body = {"probes": [{"vectors": {"old": UNIT}}, {"vectors": {"a/b~": UNIT}}]}
    problem = unchanged.refused(unchanged.client.put(f"/galleries/{GALLERY}/probes", json=body), 404, "model_not_found")
    assert problem["errors"][0]["pointer"] == "/probes/1/vectors/a~1b~0"


def test_a_path_that_does_not_take_a_method_names_all_that_it_takes(unchanged: World) -> None:
    answer = unchanged.client.delete("/galleries")
    problem = unchanged.refused(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, POST"
    assert problem["detail"] == "this path takes GET, POST, not DELETE"
    assert unchanged.client.put(f"/galleries/{GALLERY}").headers["allow"] == "DELETE, GET"
    assert unchanged.client.delete(f"{ITEMS}/a/b").headers["allow"] == "GET"
    assert unchanged.client.post("/openapi.json").headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "item",
    [
        {"embedding": [1.0]},
        {"embedding": [1.0, 0.0, None, 0.0]},
        {"embedding": [1.0, 0.0, "0", 0.0]},
        {"embedding": [1.0, 0.0, float("nan"), 0.0]},
        {"embedding": "not base64!"},
        {},
        {"embedding": UNIT, "payload": [1]},
        {"embedding": UNIT, "payload": {"a": float("inf")}},
        {"embedding": UNIT, "colour": 1},
    ],
)
def test_the_refused_item_is_named(unchanged: World, item: dict[str, Any]) -> None:
    body = {"model": "old", "items": [{"id": "good", "embedding": UNIT}, {"id": "bad", **item}]}
    answer = unchanged.client.post(ITEMS, content=json.dumps(body))
    assert (answer.status_code, answer.json()["item"]) == (422, "bad")


def test_an_item_without_an_id_is_named_by_its_place(unchanged: World) -> None:
    for item in ({"embedding": UNIT}, {"id": 7, "embedding": [None]}, 7):
        body = {"model": "old", "items": [{"id": "good", "embedding": UNIT}, item]}
        problem = unchanged.refused(unchanged.client.post(ITEMS, json=body), 422, "invalid_request")
        assert "item" not in problem
        assert problem["errors"][0]["pointer"].startswith("/items/1")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("path", [ITEMS, SEARCH])
def test_numbers_that_are_none_are_refused(unchanged: World, literal: str, path: str) -> None:
    vector = f"[1.0, 0.0, {literal}, 0.0]"
    search, upsert = f'"vector": {vector}', f'"items": [{{"id": "a", "embedding": {vector}}}]'
    content = f'{{"model": "old", {search if path == SEARCH else upsert}}}'
    answer = unchanged.client.post(path, content=content, headers={"content-type": "application/json"})
    problem = unchanged.refused(answer, 422, "invalid_vector")
    assert problem["errors"][0]["pointer"] == ("/vector/2" if path == SEARCH else "/items/0/embedding/2")


@pytest.mark.parametrize(
    ("path", "body", "code", "pointer"),
    [
        ("/admin/upgrades", {"throttle": {"items_per_second": NAN}}, "invalid_request", "/throttle/items_per_second"),
        ("/models", {"dimension": NAN}, "invalid_request", "/dimension"),
        ("/models", {"side_information": {"dimension": NAN}}, "invalid_request", "/side_information/dimension"),
        ("/models", {"vector": [NAN]}, "invalid_request", "/vector/0"),
        ("/galleries", {"index": {"kind": "ivf", "nlist": NAN}}, "invalid_request", "/index/nlist"),
        (f"{ITEMS}/delete", {"ids": [NAN]}, "invalid_request", "/ids/0"),
        (ITEMS, {"items": [{"id": NAN}]}, "invalid_request", "/items/0/id"),
        (ITEMS, {"items": [{"id": "a", "payload": {"x/y": [NAN]}}]}, "invalid_item", "/items/0/payload/x~1y/0"),
        (ITEMS, {"items": [{"id": "a", "side_information": [NAN]}]}, "invalid_vector", "/items/0/side_information/0"),
        (SEARCH, {"filter": {"price": {"lt": NAN}}}, "invalid_filter", "/filter/price/lt"),
        (SEARCH, {"k": NAN}, "invalid_request", "/k"),
        (SEARCH, {"companions": {"new": [NAN]}}, "invalid_vector", "/companions/new/0"),
        (f"{SEARCH}/batch", {"queries": [[1.0], [NAN]]}, "invalid_vector", "/queries/1/0"),
        (f"{SEARCH}/batch", {"queries": [{"vector": [NAN]}]}, "invalid_vector", "/queries/0/vector/0"),
        ("/models", NAN, "invalid_request", ""),
    ],
)
def test_a_number_that_is_none_is_refused_as_what_it_stands_for(
    unchanged: World, path: str, body: Any, code: str, pointer: str
) -> None:
    problem = unchanged.refused(unchanged.client.post(path, content=json.dumps(body)), 422, code)
    assert problem["errors"][0]["pointer"] == pointer


def test_a_base64_vector_with_a_nan_is_refused(unchanged: World) -> None:
    body = {"model": "old", "vector": "AADAfwAAAAAAAAAAAAAAAA=="}
    unchanged.refused(unchanged.client.post(SEARCH, json=body), 422, "invalid_vector")


@pytest.mark.parametrize(
    "vector", ["AACAPwAAAAAAAAAAAAAAAA", "__9_fwAAAAAAAAAAAAAAAA=="], ids=["not padded", "URL-safe"]
)
def test_of_a_vector_in_another_kind_of_base64_it_is_said_which_kind_is_read(unchanged: World, vector: str) -> None:
    problem = unchanged.refused(
        unchanged.client.post(SEARCH, json={"model": "old", "vector": vector}), 422, "invalid_vector"
    )
    assert "in its standard alphabet (+ and /) and padded" in problem["detail"]


def test_a_zero_vector_is_refused_under_cosine(world: World) -> None:
    world.model("angles", 2, metric="cosine")
    world.post("/galleries", {"name": "turned", "model": "angles"})
    before = world.everything()
    body = {"model": "angles", "items": [{"id": "a", "embedding": [0.0, 0.0]}]}
    world.refused(world.client.post("/galleries/turned/items", json=body), 422, "invalid_vector")
    search = world.client.post("/galleries/turned/search", json={"model": "angles", "vector": [0.0, 0.0]})
    world.refused(search, 422, "invalid_vector")
    assert world.everything() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"model": "old",}',
        b"\xff\xfe",
        b'{"model": "\\ud800"}',
        b'{"\\ud800": NaN}',
        b'{"items": [{"id": "\\ud800", "embedding": [NaN]}]}',
        b"[" * 100_000,
        b'{"a": 1} x',
    ],
    ids=["empty", "cut", "comma", "bytes", "surrogate", "name", "id", "deep", "more"],
)
@pytest.mark.parametrize("path", [ITEMS, SEARCH, "/models", "/admin/upgrades"])
def test_a_body_that_is_not_json_is_refused(unchanged: World, path: str, content: bytes) -> None:
    problem = unchanged.refused(unchanged.client.post(path, content=content), 400, "invalid_json")
    assert problem["errors"] == [{"pointer": "", "detail": problem["detail"]}]


@pytest.mark.parametrize("name", ["a\nb", "\0", "\x7f", "\x85", ".", "..", "x" * 513, "é" * 257])
def test_an_id_that_could_not_be_read_back_is_refused(unchanged: World, name: str) -> None:
    body = {"model": "old", "items": [{"id": name, "embedding": UNIT}]}
    problem = unchanged.refused(unchanged.client.post(ITEMS, json=body), 422, "invalid_item")
    assert (problem["item"], problem["errors"][0]["pointer"]) == (name, "/items/0/id")


@pytest.mark.parametrize("deep", [64, 253, 900])
def test_a_payload_that_is_nested_too_deep_is_refused(unchanged: World, deep: int) -> None:
    payload = b'{"a":' * deep + b"[1]" + b"}" * deep
    content = b'{"model": "old", "items": [{"id": "a", "embedding": [1, 0, 0, 0], "payload": ' + payload + b"}]}"
    problem = unchanged.refused(unchanged.client.post(ITEMS, content=content), 422, "invalid_item")
    assert (problem["item"], problem["errors"][0]["pointer"]) == ("a", "/items/0/payload")
    assert "64 deep" in problem["detail"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream"])
def test_a_body_of_another_media_type_is_refused(unchanged: World, kind: str) -> None:
    headers = {"content-type": kind}
    for path, body in ((ITEMS, items(UNIT)), (SEARCH, {"model": "old", "vector": UNIT})):
        answer = unchanged.client.post(path, content=orjson.dumps(body), headers=headers)
        unchanged.refused(answer, 415, "unsupported_media_type")


def test_a_compressed_body_is_refused(unchanged: World) -> None:
    answer = unchanged.client.post(ITEMS, content=b"x", headers={"content-encoding": "gzip"})
    unchanged.refused(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_a_body_of_65_mib_is_refused(unchanged: World, chunked: bool) -> None:
    mib = b" " * (1 << 20)
    content = (mib for _ in range(65)) if chunked else mib * 65
    problem = unchanged.refused(unchanged.client.post(ITEMS, content=content), 413, "body_too_large")
    assert problem["limit"] == "max_body_bytes"
    assert problem["maximum"] == 64 << 20
    assert unchanged.get("/health/live") == {"status": "ok"}


def put(world: World, content: bytes, sha256: str | None = None) -> Any:
    return world.client.put(f"/artifacts/{sha256 or hashlib.sha256(content).hexdigest()}", content=content)


def artifact(world: World) -> bytes:
    save(world.folder / "other.safetensors", linear([[2.0, 0, 0, 0]]))
    return (world.folder / "other.safetensors").read_bytes()


def test_a_pickle_is_no_artifact(unchanged: World) -> None:
    problem = unchanged.refused(put(unchanged, pickle.dumps({"weight": [1.0] * 100})), 422, "unsafe_artifact")
    assert problem["errors"] == [{"pointer": "", "detail": problem["detail"]}]


def test_a_truncated_safetensors_file_is_no_artifact(unchanged: World) -> None:
    whole = artifact(unchanged)
    for end in (0, 4, 40, len(whole) - 1):
        unchanged.refused(put(unchanged, whole[:end]), 422, "unsafe_artifact")


def test_a_safetensors_file_of_no_declared_architecture_is_no_artifact(unchanged: World) -> None:
    header = b'{"__metadata__": {"format": "forwardfill.transformation/1", "architecture": "{\\"kind\\": \\"exec\\"}"}}'
    unchanged.refused(put(unchanged, len(header).to_bytes(8, "little") + header), 422, "unsafe_artifact")


def test_an_artifact_under_another_digest_is_refused(unchanged: World) -> None:
    content = artifact(unchanged)
    problem = unchanged.refused(put(unchanged, content, "0" * 64), 422, "digest_mismatch")
    assert problem["sha256"] == hashlib.sha256(content).hexdigest()
    assert problem["errors"] == [{"pointer": "", "detail": problem["detail"]}]


@pytest.mark.parametrize("sha256", ["0" * 63, "0" * 63 + "A", "0" * 63 + "g", "..%2F" + "0" * 61])
def test_what_is_no_digest_names_no_artifact(unchanged: World, sha256: str) -> None:
    assert put(unchanged, b"x", sha256).status_code in (404, 422)


def test_a_transformation_in_the_wrong_direction_is_refused(world: World) -> None:
    """Registered with source and target exchanged; used although it maps queries; used although it starts elsewhere."""
    digest = world.artifact(backward())
    world.transformation("new-to-old", "new", "old", "backward", backward())
    world.model("other", 4)
    world.transformation("other-to-new", "other", "new", "forward", linear([[0] * 4] * 5))
    before = world.everything()
    body = {"name": "x", "source": "old", "target": "new", "direction": "forward", "method": "test", "artifact": digest}
    world.refused(world.client.post("/transformations", json=body), 422, "wrong_transformation")
    for name in ("new-to-old", "other-to-new"):
        start = world.client.post("/admin/upgrades", json={"gallery": GALLERY, "transformation": name})
        world.refused(start, 422, "wrong_transformation")
    assert world.everything() == before


def test_a_second_upgrade_of_the_gallery_is_refused(world: World) -> None:
    upgrade = world.start()
    before = world.everything()
    body = {"gallery": GALLERY, "transformation": "old-to-new"}
    problem = world.refused(world.client.post("/admin/upgrades", json=body), 409, "upgrade_in_progress")
    assert problem["upgrade"] == upgrade
    assert world.everything() == before


def test_what_is_not_there_is_said_in_the_same_way(unchanged: World) -> None:
    get = unchanged.client.get
    unchanged.refused(get("/nothing"), 404, "not_found")
    unchanged.refused(get("/models/%00"), 404, "not_found")
    unchanged.refused(get("/models/nobody"), 404, "model_not_found")
    unchanged.refused(get("/transformations/none"), 404, "transformation_not_found")
    unchanged.refused(get(f"{ITEMS}/none"), 404, "item_not_found")
    unchanged.refused(get("/admin/upgrades/none"), 404, "upgrade_not_found")
    unchanged.refused(get("/admin/upgrades/none/events"), 404, "upgrade_not_found")
    unchanged.refused(unchanged.client.post("/admin/upgrades/none/pause"), 404, "upgrade_not_found")
    answer = unchanged.client.delete("/models")
    unchanged.refused(answer, 405, "method_not_allowed")
    assert "POST" in answer.headers["allow"]


def test_a_page_token_that_no_list_gave_is_refused(unchanged: World) -> None:
    for token in ("x", "bnVsbA", "NQ", "Ilx1MDAwMCI"):
        unchanged.refused(unchanged.client.get("/models", params={"page_token": token}), 422, "invalid_request")
    for token in ("dHJ1ZQ", "ZmFsc2U", "MS41"):  # true, false, 1.5
        answer = unchanged.client.get("/admin/events", params={"page_token": token})
        unchanged.refused(answer, 422, "invalid_request")


def test_nothing_that_was_sent_comes_back_in_a_refusal(unchanged: World) -> None:
    answer = unchanged.client.post(SEARCH, json={"model": "old", "vector": [0.123456, "secret"]})
    unchanged.refused(answer, 422, "invalid_vector")
    assert "0.123456" not in answer.text
    assert "secret" not in answer.text


def test_the_clients_request_id_is_used_if_it_is_sane(unchanged: World) -> None:
    assert unchanged.client.get("/nothing", headers={"x-request-id": "abc-1"}).json()["request_id"] == "abc-1"
    for bad in ("a b", "x" * 200, "é".encode()):
        answer = unchanged.client.get("/nothing", headers={"x-request-id": bad})
        assert answer.json()["request_id"] == answer.headers["x-request-id"] != bad
