"""The OpenAPI document: each route names the body it takes and the errors it may answer, and the rest follows.

`service/examples.py` has the answers' examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gallery import errors
from gallery.errors import GalleryError
from service.bodies import Body
from service.errors import (
    ABOUT_BODIES,
    HEADERS,
    MEDIA_TYPE,
    TYPE,
    BodyTooLarge,
    Forbidden,
    HeadersTooLarge,
    InternalError,
    InvalidHttp,
    InvalidJson,
    InvalidRequest,
    MethodNotAllowed,
    Overloaded,
    PageNotFound,
    PointedError,
    Problem,
    RequestTimeout,
    Unauthenticated,
    Unavailable,
    UnsupportedMediaType,
    code_of,
    status_of,
)
from service.examples import ANSWERS

_REFERENCE = "#/components/schemas/{model}"
_ALWAYS: tuple[type[GalleryError], ...] = (
    Unauthenticated,
    Forbidden,
    # These two are about the path, and OpenAPI has no place for it but its operations.
    PageNotFound,
    MethodNotAllowed,
    InvalidRequest,
    Overloaded,
    HeadersTooLarge,
    InvalidHttp,
    InternalError,
    Unavailable,
    errors.Damaged,
)
_WITH_BODY: tuple[type[GalleryError], ...] = (InvalidJson, BodyTooLarge, RequestTimeout, UnsupportedMediaType)
_LOCATION = {"description": "The address of what was made.", "schema": {"type": "string", "format": "uri-reference"}}
_bodies: set[type[Body]] = set()


def documented(
    *refuses: type[GalleryError],
    takes: type[Body] | None = None,
    example: dict[str, Any] | None = None,
    optional: bool = False,
    other_content: dict[str, Any] | None = None,
    already: type[BaseModel] | None = None,
    located: int | None = None,
    answers: dict[int | str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a route that document its body and its errors.

    Args:
        refuses: errors beside those that any guarded route may answer.
        takes: the JSON body.
        example: one.
        optional: the body may be left out.
        other_content: what else is taken, by media type.
        already: what is answered with 200 if there was nothing to do.
        located: the status that comes with the address of what was made; 200 comes with it too, if it was there already.
        answers: good answers beside the route's own, by status.
    """
    content = dict(other_content or {})
    if takes is not None:
        _bodies.add(takes)
        content["application/json"] = {
            "schema": {"$ref": _REFERENCE.format(model=takes.__name__)},
            **({"example": example} if example is not None else {}),
        }
    extra = {"openapi_extra": {"requestBody": {"required": not optional, "content": content}}} if content else {}
    responses = problems((*_ALWAYS, *refuses, *(_WITH_BODY if content else ())))
    address = {} if located is None else {"headers": {"Location": _LOCATION}}
    if located is not None:
        responses[located] = address
    if already is not None:
        responses[200] = {**address, "model": already, "description": "Nothing had to be done."}
    return {"responses": {**responses, **(answers or {})}, **extra}


def problems(kinds: Iterable[type[GalleryError]]) -> dict[int | str, dict[str, Any]]:
    """Error answers by status, with an example for each code."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for kind in sorted(set(kinds), key=lambda each: (status_of(each), each.__name__)):
        status, code = status_of(kind), code_of(kind)
        answer = by_status.setdefault(
            status,
            {
                "description": "",
                "content": {MEDIA_TYPE: {"schema": {"$ref": _REFERENCE.format(model="Problem")}, "examples": {}}},
            },
        )
        answer["description"] = ", ".join(filter(None, (answer["description"], f"`{code}`")))
        for name, value in HEADERS.get(kind, {}).items():
            answer.setdefault("headers", {})[name] = {"schema": {"type": "string"}, "example": value}
        answer["content"][MEDIA_TYPE]["examples"][code] = {"value": _example(status, code, kind)}
    return by_status


def install(app: FastAPI) -> None:
    """Add to FastAPI's document the schemas that it does not see by itself."""
    generated: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generated()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            validation: list[Any] = [(body, "validation") for body in sorted(_bodies, key=lambda each: each.__name__)]
            serialization: list[Any] = [(Problem, "serialization"), (PointedError, "serialization")]
            _, found = models_json_schema(validation + serialization, ref_template=_REFERENCE)
            schemas.update(found["$defs"])
            _give_examples(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _give_examples(document: dict[str, Any]) -> None:
    """Put beside the schema of each good answer an example of it."""
    for operation in (each for methods in document["paths"].values() for each in methods.values()):
        for answer in operation["responses"].values():
            content = answer.get("content", {}).get("application/json")
            if content is not None:
                content["example"] = ANSWERS[content["schema"]["$ref"].rpartition("/")[2]]


def _example(status: int, code: str, kind: type[GalleryError]) -> dict[str, Any]:
    return {
        "type": TYPE + code,
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": kind.__doc__ or "",
        "code": code,
        "request_id": "01JD5K0Q3T0000000000000000",
        **({"errors": [{"pointer": "", "detail": kind.__doc__}]} if status in ABOUT_BODIES else {}),
    }
