"""Refusals as problem+json (RFC 9457): one table from classes to statuses, one way to answer.

ServiceError: what only HTTP can refuse
  x Unauthenticated, Forbidden
  x PageNotFound, MethodNotAllowed, HeadersTooLarge, InvalidHttp
  x InvalidJson, InvalidRequest, UnsupportedMediaType, BodyTooLarge, RequestTimeout, InvalidArrow
  x NoUncertainty
  x Overloaded, InternalError
  x Unavailable
      DiskFull, TooManyOpenFiles
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match

from gallery import errors
from gallery.catalog.transaction import in_words
from gallery.errors import GalleryError

log = structlog.get_logger()
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")

MEDIA_TYPE = "application/problem+json"
TYPE = "urn:forwardfill:problem:"
MAX_ERRORS = 20
#: statuses that find fault with a body: `errors` says where, and "" is the whole of it (RFC 6901)
ABOUT_BODIES = (400, 422)


class ServiceError(GalleryError):
    """Refused before the gallery was asked."""


class Unauthenticated(ServiceError):
    """No valid key came with the request."""


class Forbidden(ServiceError):
    """The key's scope does not allow this."""


class PageNotFound(ServiceError):
    """There is nothing at this path."""

    @property
    def code(self) -> str:
        """There are many things that may not be found; this is the page."""
        return "not_found"


class MethodNotAllowed(ServiceError):
    """The path does not take this method."""


class HeadersTooLarge(ServiceError):
    """The request's first line and headers are larger than is read."""


class InvalidHttp(ServiceError):
    """What came on the connection is not HTTP/1.1: a URL that is not percent-encoded, for example."""


class InvalidJson(ServiceError):
    """The body is not JSON."""


class InvalidRequest(ServiceError):
    """The request does not have the documented shape."""


class UnsupportedMediaType(ServiceError):
    """The body is of a type that this call does not read."""


class BodyTooLarge(ServiceError):
    """The body is larger than the published limit."""


class RequestTimeout(ServiceError):
    """The client sent nothing for too long, and the body is not there yet."""


class InvalidArrow(ServiceError):
    """The body is not an Arrow IPC stream with the documented columns."""


class NoUncertainty(ServiceError):
    """The upgrade's transformation predicts no uncertainty."""


class Overloaded(ServiceError):
    """Too many requests wait already; try again later."""


class Unavailable(ServiceError):
    """The service stops, the catalog does not answer or no longer knows what a search was about; try again later."""

    @property
    def code(self) -> str:
        """One for all kinds of it: a program tries again, and a person reads why."""
        return "unavailable"


class DiskFull(Unavailable):
    """The disk of the data folder or of the catalog is full: nothing of this was stored; make space, and send it again."""


class TooManyOpenFiles(Unavailable):
    """The service has as many files open as the system lets it (the limit of open files); try again later."""


class InternalError(ServiceError):
    """Something went wrong that is not the request's fault; the log knows more under the request id."""


#: the nearest class decides
STATUS: Mapping[type[GalleryError], int] = {
    InvalidHttp: 400,
    InvalidJson: 400,
    Unauthenticated: 401,
    Forbidden: 403,
    errors.NotFound: 404,
    PageNotFound: 404,
    MethodNotAllowed: 405,
    RequestTimeout: 408,
    errors.Conflict: 409,
    NoUncertainty: 409,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    errors.Invalid: 422,
    InvalidRequest: 422,
    InvalidArrow: 422,
    Overloaded: 429,
    HeadersTooLarge: 431,
    GalleryError: 500,
    Unavailable: 503,
}
#: what comes with a refusal beside the problem
HEADERS: Mapping[type[GalleryError], Mapping[str, str]] = {
    Unauthenticated: {"WWW-Authenticate": "Bearer"},
    # What comes later would be taken for another request.
    RequestTimeout: {"Connection": "close"},
    HeadersTooLarge: {"Connection": "close"},
    InvalidHttp: {"Connection": "close"},
    Overloaded: {"Retry-After": "1"},
    Unavailable: {"Retry-After": "1"},
    DiskFull: {"Retry-After": "10"},  # a person makes space
    TooManyOpenFiles: {"Retry-After": "1"},
}


class PointedError(BaseModel):
    """One error in the request."""

    pointer: str = Field(
        description="JSON pointer into the body, empty for the whole of it; or `/name` of a query parameter."
    )
    detail: str


class Problem(BaseModel):
    """Why a request was refused (RFC 9457). Programs read `code`; `detail` is for people and may change."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[PointedError] | None = None


def status_of(kind: type[GalleryError]) -> int:
    """The HTTP status of an error class."""
    return next(STATUS[each] for each in kind.__mro__ if each in STATUS)


def code_of(kind: type[GalleryError]) -> str:
    """The code of an error class, without an instance."""
    return kind("").code


def problem(error: GalleryError, request_id: str) -> Response:
    """The answer to a refused request."""
    status = status_of(type(error))
    # What went wrong inside may name files; clients get the class's docstring and the request id.
    detail = str(error) if status < 500 else type(error).__doc__
    body: dict[str, Any] = {
        "type": TYPE + error.code,
        "title": error.code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "code": error.code,
        "request_id": request_id,
    }
    if error.pointer is not None or (status in ABOUT_BODIES and "errors" not in error.details):
        body["errors"] = [{"pointer": error.pointer or "", "detail": detail}]
    if status < 500:
        body = {**error.details, **body}
    headers = {"X-Request-Id": request_id, **HEADERS.get(type(error), {})}
    return Response(orjson.dumps(body, default=str), status, headers, MEDIA_TYPE)


#: what a schema finds wrong, in words for people who do not know how it is written; what is not here says it by itself
_WORDS: Mapping[str, str] = {
    "missing": "this field is required",
    "extra_forbidden": "there is no such field here; /openapi.json lists those that there are",
    "model_type": "should be a JSON object",
    "dict_type": "should be a JSON object",
    "list_type": "should be a list",
    "string_type": "should be a string",
    "bool_type": "should be true or false",
}


def invalid(found: Sequence[tuple[tuple[int | str, ...], str, str]], **details: Any) -> GalleryError:
    """What a schema refused, as one error; one about vectors only has their code.

    Args:
        found: location, type and message of each thing that is wrong; never what was sent, which may be a vector.
        details: extension members for the answer.
    """
    pointed = [
        {"pointer": errors.pointer(*_place(location)), "detail": _WORDS.get(kind) or _plain(message)}
        for location, kind, message in found[:MAX_ERRORS]
    ]
    detail = f"{pointed[0]['pointer'] or 'the body'}: {pointed[0]['detail']}"
    if all(kind == "invalid_vector" for _, kind, _ in found):
        return errors.InvalidVector(detail, errors=pointed, **details)
    return InvalidRequest(detail, errors=pointed, **details)


def _place(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A location without the mark that it is a name, and not what stands under it, that is wrong."""
    return location[:-1] if location[-1:] == ("[key]",) else location


def _plain(message: str) -> str:
    """A message without what pydantic puts around it."""
    return message.removeprefix("Value error, ").partition(" after validation")[0]


def named(error: errors.Invalid, ids: Sequence[str]) -> errors.Invalid:
    """The error, with the id of the item that its pointer leads to."""
    parts = (error.pointer or "").split("/")
    if len(parts) < 3 or parts[1] != "items" or int(parts[2]) >= len(ids):
        return error
    return type(error)(str(error), pointer=error.pointer, **{**error.details, "item": ids[int(parts[2])]})


def install(app: FastAPI) -> None:
    """Answer every exception of a handler with a problem."""

    async def refused(request: Request, error: Exception) -> Response:
        found = _translated(error, request)
        if status_of(type(found)) >= 500:
            log.error("request_failed", code=found.code, error=str(found))
        answer = problem(found, request.state.request_id)
        if isinstance(found, MethodNotAllowed):
            answer.headers["Allow"] = ", ".join(found.details["allowed"])
        return answer

    async def lacking(request: Request, error: Exception) -> Response:
        if _lack(error) is None:
            raise error
        return await refused(request, error)

    async def crashed(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)  # nobody is left to hear it; it is counted as what it is
        return problem(InternalError(""), request.state.request_id)

    for kind in (GalleryError, HTTPException, RequestValidationError, SQLAlchemyError):
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(OSError, lacking)
    app.add_exception_handler(Exception, crashed)  # raised again after that, for `Telemetry` to log it


def _translated(error: Exception, request: Request) -> GalleryError:
    """What another library raised, as one of ours."""
    found: GalleryError
    if (lack := _lack(error)) is not None:
        return lack(in_words(error))
    match error:
        case errors.Outdated():
            found = Unavailable(str(error))
        case GalleryError():
            found = error
        case RequestValidationError():
            found = invalid([(each["loc"][1:], each["type"], each["msg"]) for each in error.errors()])
        case HTTPException(status_code=404):
            found = PageNotFound("there is nothing at this path; /openapi.json lists what there is")
        case HTTPException(status_code=405):
            methods = _methods(request)
            found = MethodNotAllowed(
                f"this path takes {', '.join(methods) or 'another method'}, not {request.method}", allowed=methods
            )
        case OperationalError() | InterfaceError():
            found = Unavailable(in_words(error))  # the error itself repeats the parameters, which may be anything
        case PoolTimeout():
            found = Unavailable("every connection to the catalog is in use")
        case DBAPIError():
            found = InternalError(in_words(error))
        case _:
            found = InternalError(in_words(error))
    return found


def _lack(error: Exception) -> type[Unavailable] | None:
    """What the system had no more of, where that is all that went wrong."""
    match error:
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return DiskFull
        case DBAPIError(orig=sqlite3.OperationalError(sqlite_errorcode=sqlite3.SQLITE_FULL)):
            return DiskFull
        case DBAPIError() if getattr(error.orig, "sqlstate", "") == "53100":  # PostgreSQL's
            return DiskFull
        case errors.TooManyFiles() | OSError(errno=errno.EMFILE | errno.ENFILE):
            return TooManyOpenFiles
    return None


def _methods(request: Request) -> list[str]:
    """What the path takes. Starlette would name the methods of the first route that fits it only."""
    asked = ((method, {**request.scope, "method": method}) for method in _METHODS)
    routes = request.app.routes
    return [method for method, scope in asked if any(route.matches(scope)[0] is Match.FULL for route in routes)]
