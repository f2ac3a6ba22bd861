"""The OpenAPI document is complete and true: requests that are made from it get the answers that it promises."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gallery.catalog.filters import OPERATORS
from gallery.errors import GalleryError
from gallery.settings import GallerySettings
from service.app import build_store, create_app
from service.bodies import Body
from service.errors import STATUS, ServiceError
from service.errors import code_of as code
from tests.service.world import GALLERY, World, opened

T = TypeVar("T")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 20
# What is there, so that requests come further than to its absence.
KNOWN = {
    "gallery": GALLERY,
    "model": "old",
    "transformation": "old-to-new",
    "item": "item-0",
    "vector": [1.0, 0.0, 0.0, 0.0],
    "queries": [[1.0, 0.0, 0.0, 0.0]],
    "companions": {},
}


@pytest.fixture(scope="module")
def lived_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A service with something of everything, that may be changed by anyone."""
    with opened(tmp_path_factory.mktemp("contract")) as world:
        yield world.prepared().filled()


@pytest.fixture(scope="module")
def document(lived_in: World) -> dict[str, Any]:
    found: dict[str, Any] = lived_in.get("/openapi.json")
    return found


def below(kind: type[T]) -> Iterator[type[T]]:
    """The classes that a class has below it."""
    for each in kind.__subclasses__():
        yield each
        yield from below(each)


def create_document() -> dict[str, Any]:
    """The document of a service that is not served; nothing is written but an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        return create_app(build_store(GallerySettings(data=Path(folder)))).openapi()


OPERATIONS = [(method, path) for path, methods in create_document()["paths"].items() for method in methods]


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=map(" ".join, OPERATIONS))
def test_requests_made_from_the_document_get_documented_answers(
    lived_in: World, document: dict[str, Any], method: str, path: str
) -> None:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    operation = schema[path][method]
    known: dict[str, Any] = dict(KNOWN)
    if "{upgrade}" in path and "events" not in path:  # the events of an upgrade that stands still have no end
        upgrades = lived_in.get("/admin/upgrades")["upgrades"]
        known["upgrade"] = upgrades[0]["id"] if upgrades else lived_in.start()

    @seed(1)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(), there=...)
    def check(case: Any, there: bool) -> None:
        if there and method != "delete":
            for given in (case.path_parameters, case.body):
                if isinstance(given, dict):
                    given.update({name: value for name, value in known.items() if name in given})
        response = case.call(base_url=str(lived_in.client.base_url))
        case.validate_response(response, checks=CHECKS)
        assert response.headers["x-request-id"]
        if response.status_code >= 400:
            problem = response.json()
            documented = document["paths"][path][method]["responses"][str(response.status_code)]["content"]
            assert problem["code"] in documented["application/problem+json"]["examples"]

    check()


def test_every_body_and_every_error_has_an_example(document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], (method, path)
            for kind, body in operation.get("requestBody", {}).get("content", {}).items():
                assert body.get("example") is not None, (method, path, kind)
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert answer["content"]["application/problem+json"]["examples"], (method, path, status)


def test_the_examples_of_bodies_are_valid() -> None:
    with_examples = create_document()
    components = with_examples["components"]
    for path, methods in with_examples["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body is not None:
                schema = {**body["schema"], "components": components}
                assert jsonschema_rs.is_valid(schema, body["example"]), (method, path)


def test_every_good_answer_has_an_example_that_is_valid_and_whole(document: dict[str, Any]) -> None:
    components = document["components"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                for kind, content in answer.get("content", {}).items():
                    if int(status) >= 400:
                        continue
                    assert content["example"], (method, path, status, kind)
                    if kind == "application/json":
                        schema = {**content["schema"], "components": components}
                        jsonschema_rs.validate(schema, content["example"])
                        fields = components["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
                        assert content["example"].keys() == fields.keys(), (method, path, status)


def test_the_examples_of_errors_are_problems(document: dict[str, Any]) -> None:
    schema = {"$ref": "#/components/schemas/Problem", "components": document["components"]}
    for methods in document["paths"].values():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    for code, example in answer["content"]["application/problem+json"]["examples"].items():
                        jsonschema_rs.validate(schema, example["value"])
                        assert (example["value"]["code"], example["value"]["status"]) == (code, int(status))


def test_headers_that_a_client_goes_by_are_documented(document: dict[str, Any]) -> None:
    def headers(path: str, status: str) -> set[str]:
        return set(document["paths"][path]["post"]["responses"][status].get("headers", ()))

    made = (("/admin/upgrades", "202"), ("/transformations/fit", "202"), ("/models", "201"), ("/models", "200"))
    for path, status in made:
        assert headers(path, status) == {"Location"}
        assert (headers(path, "401"), headers(path, "429")) == ({"WWW-Authenticate"}, {"Retry-After"})


def test_limits_of_parameters_are_written_in_words_of_json_schema(document: dict[str, Any]) -> None:
    """Where a validator of ours comes before a limit, Pydantic writes its own word for it, which nobody else knows."""
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    schemas = [each["schema"] for operation in operations for each in operation.get("parameters", [])]
    assert not [schema for schema in schemas if schema.keys() & {"ge", "gt", "le", "lt", "min_length", "max_length"}]
    assert {schema.get("minimum") for schema in schemas if schema["title"] == "Page Size"} == {1}


def test_what_a_filter_may_say_is_told_and_the_examples_are_taken(lived_in: World, document: dict[str, Any]) -> None:
    told = document["components"]["schemas"]["SearchBody"]["properties"]["filter"]
    assert not [each for each in (*OPERATORS, "and", "or", "not") if f"`{each}`" not in told["description"]]
    for example in told["examples"]:
        lived_in.old_search(0, filter=example)


def test_every_body_refuses_unknown_fields() -> None:
    for kind in below(Body):
        assert kind.model_config["extra"] == "forbid"


def test_every_code_is_documented_somewhere(document: dict[str, Any]) -> None:
    documented = {
        example
        for methods in document["paths"].values()
        for operation in methods.values()
        for answer in operation["responses"].values()
        for content in answer.get("content", {}).values()
        for example in content.get("examples", {})
    }
    known = {code(kind) for kind in (*below(ServiceError), *below(GalleryError)) if not kind.__subclasses__()}
    # What only the command line and workers are refused with, and what is answered as `unavailable`.
    assert known - documented == {"key_not_found", "key_exists", "lease_lost", "outdated", "too_many_files"}
    assert all(100 <= status < 600 for status in STATUS.values())


def test_what_an_operation_may_answer_seldom_is_documented_too(document: dict[str, Any]) -> None:
    def documented(method: str, path: str, status: str) -> Any:
        return document["paths"][path][method]["responses"][status]["content"]["application/problem+json"]["examples"]

    assert "conflict" in documented("post", "/galleries/{gallery}/items", "409")
    assert "gallery_not_found" in documented("get", "/admin/upgrades/{upgrade}/refinement", "404")
