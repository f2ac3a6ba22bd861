"""What the client raises where the service refused, or an upgrade did not go where it was waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import orjson

from forwardfill.answers import Json, Upgrade

#: the code of what came from something else than the service
NOT_A_PROBLEM = "not_a_problem"


def _unraised(kind: type[Exception], args: tuple[object, ...]) -> Exception:
    return kind.__new__(kind, *args)


class _Travels(Exception):
    """Can be copied and pickled: processes of a pool answer so, and one that cannot rebuild an error breaks its pool."""

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
        #: the whole answer: extension members, such as `allowed`, are here
        self.problem: Json = {}


class UpgradeStoppedError(_Travels):
    """An upgrade that was waited for came to rest in another state."""

    def __init__(self, upgrade: Upgrade) -> None:
        """Tell the state, and the error if there is one."""
        reason = f": {upgrade['error']}" if upgrade.get("error") else ""
        super().__init__(f"upgrade {upgrade['id']} is {upgrade['state']}{reason}")
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
    """Make an error of a success that the service cannot have answered: a proxy or a sign-in page did, or another service."""
    url, kind = response.request.url, response.headers.get("content-type", "something without a type")
    detail = f"what answers at {url.scheme}://{url.netloc.decode()} is no Forwardfill service: it sent {kind}"
    return ForwardfillError(response.status_code, NOT_A_PROBLEM, detail)


def problem(response: httpx.Response) -> ForwardfillError:
    """Make an error of a refusal; one that is no problem+json comes from something before the service."""
    body = _json_object(response)
    if body is None:
        return ForwardfillError(response.status_code, NOT_A_PROBLEM, response.text[:500] or response.reason_phrase)
    errors = body.get("errors")
    error = ForwardfillError(
        response.status_code,
        str(body.get("code", "unknown")),
        str(body.get("detail") or body.get("title") or response.reason_phrase),
        [each for each in errors if isinstance(each, dict)] if isinstance(errors, list) else (),
        body.get("request_id"),
    )
    error.problem = body
    return error


def _json_object(response: httpx.Response) -> Json | None:
    try:
        body = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return None
    return body if isinstance(body, dict) else None
