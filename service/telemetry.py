"""What an operator sees of requests: an id on every answer, one log event for each. Never vectors, never keys."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import select
import stat
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from itertools import count
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson
import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from gallery.catalog.transaction import in_words
from service.errors import InternalError, PageNotFound, Unavailable, problem

if TYPE_CHECKING:
    from service.metrics import Counts

log = structlog.get_logger()
#: the id of the request under way, which is in each event that the request logs
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

#: together the id of a request whose client gave none: unique, and cheap to make
_PROCESS, _numbers = str(ULID()), count(1)
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
#: called with a request's scope, its id, the status of its answer, and the seconds that it took
Account = Callable[[Scope, str, int, float], None]
# How long a slow reader of the log may keep everybody waiting.
_STALL_SECONDS = 0.1
_QUIET = frozenset({"/health/live", "/health/ready", "/metrics"})


def new_request_id() -> str:
    """An id for a request whose client gave none."""
    return f"{_PROCESS}-{next(_numbers)}"


class Telemetry:
    """Outermost: names each request, logs it, counts it, and answers what no handler caught."""

    def __init__(self, app: ASGIApp, counts: Counts) -> None:
        """Wrap `app`."""
        self._app = app
        self._counts = counts
        self._log: Any = log.bind()  # what is bound already costs half

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        _request_id.set(request_id)
        answer = _Answer(send, request_id)
        started = time.perf_counter()
        try:
            await self._answered(scope, receive, answer)
        finally:
            self.account(scope, request_id, answer.status, time.perf_counter() - started)

    async def _answered(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            if "\0" in scope["path"]:  # no name holds one, and PostgreSQL cannot even be asked for it
                await problem(PageNotFound("there is nothing at this path"), answer.request_id)(scope, receive, answer)
                return
            await self._app(scope, receive, answer)
        except asyncio.CancelledError:  # the process stops, and waits for this request no longer
            if answer.status:
                raise
            await problem(Unavailable(""), answer.request_id)(scope, receive, answer)
        except ClientDisconnect:
            answer.status = answer.status or 499  # nobody is left to hear it
        except Exception as error:
            log.exception("request_crashed", error=in_words(error))
            if not answer.status:
                await problem(InternalError(""), answer.request_id)(scope, receive, answer)
            elif not answer.whole:
                raise  # part of the answer is gone already; the server closes the connection

    def account(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        """Log and count a request that was answered, whichever way it took."""
        route = getattr(scope.get("route"), "path", "unmatched")
        self._counts.requested(scope["method"], route, status)
        if scope["path"] not in _QUIET:
            self._log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                milliseconds=round(seconds * 1000, 2),
                request_id=request_id,
            )


class _Answer:
    """Sends, with the request id in the headers, and remembers the status."""

    __slots__ = ("_send", "request_id", "status", "whole")

    def __init__(self, send: Send, request_id: str) -> None:
        self.request_id = request_id
        self.status = 0
        #: nothing is left to be sent
        self.whole = False
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
            message = {**message, "headers": [*headers, (b"x-request-id", self.request_id.encode())]}
        else:
            self.whole = not message.get("more_body", False)
        await self._send(message)


def request_id_of(scope: Scope) -> str:
    """The client's own request id, if it can be logged and sent back as it is; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            if _SANE_ID.fullmatch(text):
                return text
    return new_request_id()


def configure_logs() -> None:
    """One JSON object per line on standard output, events with fields."""
    lines = _Lines(sys.stdout.buffer if sys.stdout is not None else None)  # None: it was closed before Python started
    structlog.configure(
        processors=[_as_line],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_: lines,
    )


class _Lines:
    """Writes lines to standard output. Where that cannot take them, lines are lost, and nothing else goes wrong.

    It may be closed, a full disk, or a pipe or a terminal whose reader has gone or stopped reading (Ctrl-S). A write to the last
    two would block without end, and with it the event loop and all requests. So a write waits for the reader briefly, and once
    that was in vain, not again until it reads.
    """

    def __init__(self, file: BinaryIO | None) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._may_stall = file is not None and _may_stall(file)
        self._stalled = self._torn = False

    def msg(self, message: bytes) -> None:
        if self._file is not None:
            with suppress(OSError, ValueError), self._lock:
                self._write(self._file, message + b"\n")

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg

    def _write(self, file: BinaryIO, line: bytes) -> None:
        if self._torn:
            line = b"\n" + line
        # If a pipe takes anything without blocking, it takes this many bytes, and does not mix them with what others write.
        piece = select.PIPE_BUF if self._may_stall else len(line)
        for start in range(0, len(line), piece):
            if self._may_stall and not self._is_read(file):
                self._torn |= start > 0
                return
            file.write(line[start : start + piece])
            file.flush()
        self._torn = False

    def _is_read(self, file: BinaryIO) -> bool:
        _, ready, _ = select.select((), (file,), (), 0 if self._stalled else _STALL_SECONDS)
        self._stalled = not ready
        return bool(ready)


def _may_stall(file: BinaryIO) -> bool:
    """Whether writing blocks once nobody reads what was written."""
    try:
        return not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except OSError:  # not a file of the operating system
        return False


def _as_line(logger: Any, level: str, event: MutableMapping[str, Any]) -> bytes:
    """An event as JSON. One processor, since each request is an event and each processor costs it a microsecond or more."""
    if "exc_info" in event:
        event = structlog.processors.format_exc_info(logger, level, event)
    event["level"] = level
    event["timestamp"] = datetime.now(UTC)
    if "request_id" not in event and (request_id := _request_id.get()):
        event["request_id"] = request_id
    return orjson.dumps(event, default=repr, option=orjson.OPT_UTC_Z)


def pass_on_libraries() -> None:
    """Write what libraries log as lines like ours; by default it would go to standard error as bare text."""
    root = logging.getLogger()
    if not any(isinstance(each, _PassOn) for each in root.handlers):
        root.addHandler(_PassOn(logging.WARNING))
        logging.captureWarnings(True)


class _PassOn(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            exc_info = {"exc_info": record.exc_info} if record.exc_info else {}
            level = min(record.levelno // 10 * 10, logging.CRITICAL)
            log.log(level, "library", logger=record.name, message=record.getMessage(), **exc_info)
        except Exception:  # noqa: BLE001 - as the standard handlers do: who logs must not fail
            self.handleError(record)
