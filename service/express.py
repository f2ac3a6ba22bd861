"""Brief searches, answered before FastAPI: its routing and its dependencies take longer than they do.

Whatever is not a brief, well-formed search of someone who may search goes on to the application as it came, with its body,
and is answered or refused there. So what a search means, and why one is refused, is said in one place, and here only what is
answered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import orjson
from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gallery.errors import GalleryError
from service import auth, keys
from service.api.search import SearchBody, answered_on_the_loop, router
from service.bodies import in_time
from service.errors import RequestTimeout, problem
from service.process import Process

#: a base64 vector of 8,192 numbers, and as much again for companions; whatever is larger takes its time anyway
_MOST_BYTES = 1 << 16
_BEFORE, _AFTER = "/galleries/", "/search"
#: by which requests are counted, whichever way they take
_ROUTE = next(route for route in router.routes if getattr(route, "path", "") == f"{_BEFORE}{{gallery}}{_AFTER}")


class Express:
    """The searches that take the short way."""

    def __init__(self, app: ASGIApp, process: Process) -> None:
        """Stand before `app`."""
        self._app = app
        self._process = process
        self._most_bytes = min(_MOST_BYTES, process.settings.max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        gallery = _searched(scope, self._most_bytes)
        if gallery is None or not self._admitted(scope):
            await self._app(scope, receive, send)
            return
        scope["route"] = _ROUTE
        try:
            message = await in_time(receive(), self._process)
        except RequestTimeout as error:
            await problem(error, scope["state"]["request_id"])(scope, receive, send)
            return
        body = message.get("body", b"")
        answer = None if message.get("more_body") or not body else await self._answer(gallery, body)
        if answer is None:
            await self._app(scope, _first(message, receive), send)
            return
        length = str(len(answer)).encode()
        headers = [(b"content-length", length), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _admitted(self, scope: Scope) -> bool:
        """Before the body is waited for; the application says why not."""
        try:
            auth.admitted(self._process, scope, keys.Scope.SEARCH)
        except GalleryError:
            return False
        return True

    async def _answer(self, gallery: str, body: bytes) -> bytes | None:
        """None where the application is to say why not."""
        try:
            search = SearchBody.model_validate(orjson.loads(body))
            return await answered_on_the_loop(self._process, gallery, search)
        except (GalleryError, ValidationError, orjson.JSONDecodeError):
            return None


def _searched(scope: Scope, most_bytes: int) -> str | None:
    """The gallery of a search whose body is small and plain; None for any other request."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return None
    path: str = scope["path"]
    if not (path.startswith(_BEFORE) and path.endswith(_AFTER)):
        return None
    small = False
    for name, value in scope["headers"]:
        if name == b"content-length":
            small = value.isdigit() and int(value) <= most_bytes
        elif name == b"content-encoding" or (name == b"content-type" and not _is_json(value)):
            return None
    return path[len(_BEFORE) : -len(_AFTER)] if small else None


def _is_json(media_type: bytes) -> bool:
    return media_type.partition(b";")[0].strip().lower() == b"application/json"


def _first(message: Message, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """Receives a message again that was received already, and then what comes."""
    waiting = [message]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again
