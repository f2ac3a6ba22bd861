"""What the client raises where the service refused, or an upgrade did not go where it was waited for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import orjson

from forwardfill.answers import Json, Upgrade

#: the code of an error that did not come from the service
NOT_A_PROBLEM = "not_a_problem"


def _unraised(kind: type[Exception], args: tuple[object, ...]) -> Exception:
    return kind.__new__(kind, *args)


class _Travels(Exception):
    """An error that can be copied and pickled; one that cannot would break a pool of processes that raises it."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild without the constructor, which does not take the message that Python would call it with."""
        return _unraised, (type(self), self.args), self.__dict__


class ForwardfillError(_Travels):
    """The service refused a request, and says why."""

    def __init__(
        self, status: int, code: str, detail: str, errors: Sequence[Json] = (), request_id: str | None = None
    ) -> None:
        """Say what was refused.

        Args:
            status: of HTTP.
            code: stable, for programs.
            detail: for people.
            errors: what is wrong in the body, as `{"pointer", "detail"}`.
            request_id: to find the request in the service's log.
        """
        super().__init__(f"{code} ({status}): {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = list(errors)
        self.request_id = request_id
        #: seconds until it may be asked again; None where the answer does not say
        self.retry_after: float | None = None
        #: the whole answer: extension members, such as `allowed`, are here
        self.problem: Json = {}


class ImpossibleName(ValueError):
    """What was given for a name or an id cannot be one; nothing was sent."""


class UpgradeStoppedError(_Travels):
    """An upgrade that was waited for came to rest in another state, or its gate paused it."""

    def __init__(self, upgrade: Upgrade) -> None:
        """Tell the state, and why: the error, or else what its conditions say."""
        why = upgrade["error"] or "; ".join(each["detail"] for each in upgrade["conditions"])
        super().__init__(f"upgrade {upgrade['id']} is {upgrade['state']}" + (f": {why}" if why else ""))
        self.upgrade = upgrade


def answered(response: httpx.Response) -> Json:
    """What the service answered: a JSON object, or nothing, which is an empty one.

    Raises:
        ForwardfillError: it refused, or what answered is not the service.
    """
    if not response.is_success:
        raise problem(response)
    if response.status_code == httpx.codes.NO_CONTENT:
        return {}
    body = _json_object(response)
    if body is None:
        raise stranger(response)
    return body


def stranger(response: httpx.Response) -> ForwardfillError:
    """Make an error of a success that is not an answer of the service: a proxy, a sign-in page or another service sent it."""
    url, kind = response.request.url, response.headers.get("content-type", "something without a type")
    detail = f"what answers at {url.scheme}://{url.netloc.decode()} is no Forwardfill service: it sent {kind}"
    return ForwardfillError(response.status_code, NOT_A_PROBLEM, detail)


def problem(response: httpx.Response) -> ForwardfillError:
    """Make an error of a refusal; one that is not problem+json came from something in front of the service."""
    body = _json_object(response)
    if response.has_redirect_location:
        error = ForwardfillError(response.status_code, NOT_A_PROBLEM, _elsewhere(response))
    elif body is None:
        error = ForwardfillError(response.status_code, NOT_A_PROBLEM, response.text[:500] or response.reason_phrase)
    else:
        errors = body.get("errors")
        error = ForwardfillError(
            response.status_code,
            str(body.get("code", "unknown")),
            str(body.get("detail") or body.get("title") or response.reason_phrase),
            [each for each in errors if isinstance(each, dict)] if isinstance(errors, list) else (),
            body.get("request_id"),
        )
        error.problem = body
    error.retry_after = _seconds(response.headers.get("retry-after", ""))
    return error


def _elsewhere(response: httpx.Response) -> str:
    """Where a redirect leads. It is not followed: the key is for the service that was named, and a POST could become a GET."""
    asked, target = response.request.url, response.request.url.join(response.headers["location"])
    there = f"{_shown(asked)} leads to {_shown(target)}"
    if target.path == asked.path:
        return f"{there}; use {_shown(target, '')} instead of {_shown(asked, '')} in the service's URL"
    return f"{there}; use the URL at which the service itself answers"


def _shown(url: httpx.URL, path: str | None = None) -> str:
    """The URL without the parts that may be secret."""
    return f"{url.scheme}://{url.netloc.decode()}{url.path if path is None else path}"


def _seconds(retry_after: str) -> float | None:
    """How long to wait by a Retry-After header, which has a number of seconds or a date."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = max(0.0, (parsedate_to_datetime(retry_after).astimezone(UTC) - datetime.now(UTC)).total_seconds())
        except ValueError:
            return None
    return seconds if 0 <= seconds < math.inf else None


def _json_object(response: httpx.Response) -> Json | None:
    try:
        body = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return None
    return body if isinstance(body, dict) else None
