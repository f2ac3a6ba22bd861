"""How an API process reads HTTP: as uvicorn does, but with a limit on a request's head, and with brief searches set apart.

uvicorn has no such limit, and a head is read before the key in it can be checked: anyone could fill all memory and hold up the
event loop.

Nor has it a limit on how long an answer waits to be read: who asks and reads nothing would have all answers kept in memory.

Whoever offers to go on in another protocol is answered in this one, as RFC 9110 (7.8) has it: Java's client offers HTTP/2 with
each request that is not encrypted. uvicorn would lose the body, and whatever came behind it on the connection.
"""

from __future__ import annotations

import socket
import struct
import sys
from asyncio import TimerHandle
from functools import partial
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.errors import HeadersTooLarge, InvalidHttp, ServiceError, problem
from service.express import Brief, Express
from service.telemetry import new_request_id

log = structlog.get_logger()

#: bytes of a request's first line and headers; proxies and other servers take 8 to 64 KiB
MOST_BYTES = 64 * 1024
_LINGER_SECONDS = 1.0
_AT_ONCE = struct.pack("ii", 1, 0)  # on, for 0 seconds
# How long the body of a brief search may take to come. After that the application waits for it, and longer.
_BODY_SECONDS = 0.1
_NOT_HTTP = "this is not HTTP/1.1 as the service reads it; are path and query percent-encoded?"


class Protocol(HttpToolsProtocol):
    """One connection.

    Bytes are counted while they belong only to a head, or to trailers (headers behind a body, which nobody reads). A head nearly
    always comes whole in one small piece, which costs two comparisons; any other is measured once it is complete.
    """

    #: bytes in the pieces since the last that brought anything but parts of a head or of trailers
    _useless = 0
    _of_use = _suspect = _too_large = _refused = False
    #: where in a piece the parser stopped, at an offer of another protocol
    _stopped: int | None = None
    #: the request begun last; `cycle` is the one read last, which may still wait for it
    _begun: RequestResponseCycle | None = None
    #: a brief search whose body is not complete yet
    _brief: Brief | None = None
    #: looks whether the client reads, while so much waits to be read that no more is written
    _reading: TimerHandle | None = None

    def __init__(self, *given: Any, **named: Any) -> None:
        """Arguments as of uvicorn's class; the application is one of `service.app`."""
        super().__init__(*given, **named)
        self._express: Express = self.config.app.state.express  # type: ignore[union-attr]
        self._idle_seconds: float = self.config.app.state.process.settings.body_idle_seconds  # type: ignore[union-attr]

    def data_received(self, data: bytes) -> None:
        """Read a piece."""
        if self._refused:
            return
        self._of_use, self._suspect = False, len(data) > MOST_BYTES or self._in_head()
        self._read(data)
        self._useless = 0 if self._of_use else self._useless + len(data)
        if self._useless > MOST_BYTES and not self._refused:
            self._refuse(_too_large())
        self._wait()

    def on_headers_complete(self) -> None:
        """Begin with a request, unless its head is too large: what is raised here ends the parsing with `send_400_response`."""
        self._of_use = True
        if self._suspect and len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MOST_BYTES:
            self._too_large = True
            raise ValueError("the request's head is too large")
        if not self._offers():
            HttpToolsProtocol.on_headers_complete(self)

    def on_body(self, body: bytes) -> None:
        """Hand on a part of a body."""
        self._of_use = True
        HttpToolsProtocol.on_body(self, body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._of_use = True
        if self._offers():
            return
        HttpToolsProtocol.on_message_complete(self)
        brief = self._brief
        if brief is not None and brief.cycle is self.cycle:
            self._brief = None
            self._express.ask(brief)

    def on_response_complete(self) -> None:
        """Begin with the request that waited for it, if any."""
        HttpToolsProtocol.on_response_complete(self)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing comes any more. uvicorn tells the request that it read last, and not one before it that is under way."""
        self._stop_looking()
        HttpToolsProtocol.connection_lost(self, exc)
        if self._begun is not None and not self._begun.response_complete:
            self._begun.disconnected = True
            self._begun.message_event.set()
        if self._brief is not None:
            self._hand_on(self._brief)

    def pause_writing(self) -> None:
        """Much waits to be read."""
        HttpToolsProtocol.pause_writing(self)
        self._look_later()

    def resume_writing(self) -> None:
        """Little waits to be read."""
        self._stop_looking()
        HttpToolsProtocol.resume_writing(self)

    def _look_later(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._reading = self.loop.call_later(self._idle_seconds, self._look, left)

    def _look(self, before: int) -> None:
        """Close the connection if nothing was read."""
        if self.transport.get_write_buffer_size() < before:
            self._look_later()
        else:
            # What the system holds for the client is dropped too: it would wait for it to be read.
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            self.transport.abort()

    def _stop_looking(self) -> None:
        if self._reading is not None:
            self._reading.cancel()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Begin with a request, whose body is not complete, unless it had to wait for those before it."""
        self._begun = cycle
        gallery = self._express.searched(cycle)
        run = partial(HttpToolsProtocol._start_asgi_task, self, cycle, app)
        if gallery is None:
            run()
            return
        brief = Brief(cycle, gallery, run=run, account=self._express.account, tasks=self.tasks)
        if cycle.more_body:
            self._brief = brief
        else:
            self._express.ask(brief)

    def _wait(self) -> None:
        if self._brief is not None:
            self.loop.call_later(_BODY_SECONDS, self._hand_on, self._brief)

    def _hand_on(self, brief: Brief) -> None:
        """Let the application wait for the rest of a body."""
        if self._brief is brief:
            self._brief = None
            brief.hand_on()

    def _offers(self) -> bool:
        """Whether a request is read with an offer of another protocol, at which the parser stops behind the head."""
        return self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers)

    def _should_upgrade(self) -> bool:
        """No other protocol is spoken here."""
        return False

    def _unsupported_upgrade_warning(self) -> None:
        """The parser has stopped; called while `HttpParserUpgrade` is handled, which says where."""
        (self._stopped,) = sys.exception().args  # type: ignore[union-attr]

    def _read(self, data: bytes) -> None:
        """Read on behind each offer, by a parser that has not stopped: the head without the offer, and then the rest."""
        rest = memoryview(data)
        HttpToolsProtocol.data_received(self, data)
        while (stopped := self._stopped) is not None:
            self._stopped, rest, head = None, rest[stopped:], self._head_without_offer()
            self.parser = type(self.parser)(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            HttpToolsProtocol.data_received(self, head)
            if not self._refused:
                HttpToolsProtocol.data_received(self, rest)  # type: ignore[arg-type]  # whatever has a buffer

    def _head_without_offer(self) -> bytes:
        head = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        head += [b"%b: %b" % each for each in self.headers if each[0] != b"upgrade"]
        return b"\r\n".join((*head, b"", b""))

    def _in_head(self) -> bool:
        """Whether a head has begun and is not complete."""
        return self.scope is not None and (self.cycle is None or self.cycle.scope is not self.scope)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn calls it
        """Refuse what cannot be parsed."""
        self._refuse(_too_large() if self._too_large else InvalidHttp(_NOT_HTTP))

    def _refuse(self, error: ServiceError) -> None:
        """Answer with an error and close; after the answers of whole requests before it, for which it would be taken."""
        log.warning(error.code, client=self.client and self.client[0])
        self._refused = True
        last, in_head = self.cycle, self._in_head()
        if last is not None and last.response_started and not in_head:  # a rest of what was answered without it
            self.transport.close()
            return
        before = last if in_head else self._begun
        if before is not None and not before.response_complete and (in_head or before is not last):
            before.keep_alive = False
            return
        answer = problem(error, new_request_id())
        head = [STATUS_LINE[answer.status_code]]
        head += [b"%b: %b\r\n" % each for each in (*self.server_state.default_headers, *answer.raw_headers)]
        self.transport.write(b"".join((*head, b"\r\n", answer.body)))
        self.transport.write_eof()
        # Closed while the client sends, the connection would be reset, and the answer lost on its way.
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"a request's first line and headers may have {MOST_BYTES} bytes", maximum=MOST_BYTES)
