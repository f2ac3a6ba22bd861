"""Brief searches, answered without FastAPI and ASGI, whose task, messages, routing and dependencies take longer than the search.

Only a brief, well-formed search of someone who may search is answered here. Any other request, and any that fails here, goes to
the application unchanged, with its body, and is answered or refused there. So the application alone says what a search means and
why one is refused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from gallery.errors import GalleryError
from gallery.search.request import Answer
from gallery.snapshot import World
from service import auth, keys
from service.api.search import SearchBody, answer_as_json, brief_request, router
from service.errors import Unavailable, problem
from service.process import Process
from service.telemetry import Account, request_id_of

#: enough for a base64 vector of 8,192 numbers and as much again for companions; larger searches take long anyway
_MOST_BYTES = 1 << 16
_BEFORE, _AFTER = "/galleries/", "/search"
#: the route under which these requests are counted too
_ROUTE = next(route for route in router.routes if getattr(route, "path", "") == f"{_BEFORE}{{gallery}}{_AFTER}")


class Brief:
    """A request that the server has begun with, but for which it has not run the application.

    It is answered, refused or handed on, once: a `gather.Asker`.
    """

    __slots__ = ("_account", "_begun", "_body", "_run", "_tasks", "cycle", "gallery", "scope", "since")

    def __init__(
        self,
        cycle: RequestResponseCycle,
        gallery: str,
        *,
        run: Callable[[], None],
        account: Account,
        tasks: set[asyncio.Task[None]],
    ) -> None:
        """Take a request.

        Args:
            cycle: uvicorn's object for the request.
            gallery: the one to search.
            run: runs the application for the request.
            account: called once the request is answered.
            tasks: those that the server waits for when it stops, and cancels in the end.
        """
        self.cycle = cycle
        self.scope: Scope = cycle.scope  # type: ignore[assignment]
        self.gallery = gallery
        #: when the body was complete: what a client takes to send it must not count as the time of a search
        self.since = self._begun = time.perf_counter()
        self._tasks = tasks
        self._run = run
        self._account = account
        self._body: SearchBody | None = None

    def read(self) -> SearchBody:
        """What is asked; raises whatever is wrong with it."""
        self._body = SearchBody.model_validate(orjson.loads(self.cycle.body))
        return self._body

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task that the server waits for when it stops."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def hand_on(self) -> None:
        """Let the application answer, unless the answer has begun."""
        if not self.cycle.response_started:
            self._run()

    def answered(self, answer: Answer, query: int) -> None:
        """Answer with what was found for one of several queries."""
        assert self._body is not None  # noqa: S101 - it was read before it was asked
        body = answer_as_json(self._body, answer, query, self.since)
        self._write(
            request_id_of(self.scope),
            200,
            b"content-length: %d\r\ncontent-type: application/json\r\n" % len(body),
            body,
        )

    def refuse(self, error: GalleryError) -> None:
        """Refuse the request: the application can no longer be run for it."""
        request_id = request_id_of(self.scope)
        refusal: Response = problem(error, request_id)
        head = b"".join(b"%b: %b\r\n" % each for each in refusal.raw_headers if each[0] != b"x-request-id")
        self._write(request_id, refusal.status_code, head, bytes(refusal.body))

    def _write(self, request_id: str, status: int, head: bytes, body: bytes) -> None:
        """Write the answer as uvicorn's cycle does, but in one piece."""
        cycle = self.cycle
        if not cycle.disconnected and not cycle.transport.is_closing():
            common = b"".join([b"%b: %b\r\n" % each for each in cycle.default_headers])
            ours = b"x-request-id: %b\r\n" % request_id.encode()
            close = b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n"
            cycle.transport.write(b"".join((STATUS_LINE[status], common, head, ours, close, body)))
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()
        self.scope["route"] = _ROUTE
        self._account(self.scope, request_id, status, time.perf_counter() - self._begun)


class Express:
    """Decides which searches are answered here, and answers them; used from the event loop only."""

    def __init__(self, process: Process, account: Account) -> None:
        """Answer for `process`; `account` is told of each answer."""
        self.account = account
        self._process = process
        self._most_bytes = min(_MOST_BYTES, process.settings.max_body_bytes)

    def searched(self, cycle: RequestResponseCycle) -> str | None:
        """The gallery of a request whose head is that of a brief search, and whose sender may search; None for all else.

        The sender is checked before the body is waited for; if it may not search, the application says why. Without keys,
        who may search depends on the client's address. Behind a proxy only the application knows that: uvicorn finds it out
        on the way there.
        """
        scope: Scope = cycle.scope  # type: ignore[assignment]
        gallery = _searched(scope, self._most_bytes)
        if gallery is None or cycle.waiting_for_100_continue or cycle.flow.write_paused:
            return None
        try:
            if not self._process.keyring.current.needed and _forwarded(scope):
                return None
            auth.admitted(self._process, scope, keys.Scope.SEARCH)
        except Exception:  # noqa: BLE001 - the application meets it too, and says what it is
            return None
        return gallery

    def ask(self, brief: Brief) -> None:
        """Answer, or hand on, a request whose body is there. Never raises, since a parser calls it."""
        brief.since = time.perf_counter()
        if self._process.galleries.behind is None:
            self._ask(brief, self._process.galleries.current)
            return
        brief.start(self._caught_up(brief))

    async def _caught_up(self, brief: Brief) -> None:
        try:
            world = await self._process.catch_up.world_on_the_loop()
        except asyncio.CancelledError:
            brief.refuse(Unavailable(""))
            raise
        except Exception:  # noqa: BLE001 - as in `_ask`
            brief.hand_on()
        else:
            self._ask(brief, world)

    def _ask(self, brief: Brief, world: World) -> None:
        try:
            asked = brief_request(self._process, world, brief.gallery, brief.read())
        except Exception:  # noqa: BLE001 - the application meets it too, and says what it is
            asked = None
        if asked is None:
            brief.hand_on()
        else:
            self._process.gatherer.ask(world, brief.gallery, *asked, brief)


def _searched(scope: Scope, most_bytes: int) -> str | None:
    """The gallery of a search whose body is small and plain; None for any other request."""
    if scope["method"] != "POST":
        return None
    path: str = scope["path"]
    if not (path.startswith(_BEFORE) and path.endswith(_AFTER)):
        return None
    small = False
    for name, value in scope["headers"]:
        if name == b"content-length":
            small = len(value) < 8 and value.isdigit() and 0 < int(value) <= most_bytes
        elif name == b"content-encoding" or (name == b"content-type" and not _is_json(value)):
            return None
    return path[len(_BEFORE) : -len(_AFTER)] if small else None


def _forwarded(scope: Scope) -> bool:
    return any(name.startswith(b"x-forwarded-") for name, _ in scope["headers"])


def _is_json(media_type: bytes) -> bool:
    return media_type.partition(b";")[0].strip().lower() == b"application/json"
