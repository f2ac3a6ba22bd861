"""How an API process reads HTTP: as uvicorn does, but no more of a request's head than is decent.

uvicorn has no limit of its own, and a head is read before anyone's key is looked at: it would take all memory, and the event
loop with it.
"""

from __future__ import annotations

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.errors import HeadersTooLarge, problem
from service.telemetry import new_request_id

log = structlog.get_logger()

#: bytes of a request's first line and headers; proxies and other servers take 8 to 64 KiB
MOST_BYTES = 64 * 1024
_LINGER_SECONDS = 1.0


class Protocol(HttpToolsProtocol):
    """One connection.

    A head nearly always comes whole in one small piece, and then this costs a comparison. Of any other it is counted what comes
    before it is complete, but for the piece that it begins in; once it is complete, it is measured.
    """

    #: bytes that came since a head began in an earlier piece, and one; 0 where none waits for its end
    _waiting = 0
    _suspect = False
    _refused = False
    #: whether a piece brought anything but trailers, the headers behind a body that nobody reads; and how many bytes of them came
    _of_use = False
    _trailing = 0

    def data_received(self, data: bytes) -> None:
        """Read a piece."""
        if self._waiting or len(data) > MOST_BYTES:
            self._received_with_care(data)
            return
        self._of_use = False
        HttpToolsProtocol.data_received(self, data)
        if self._in_head():
            self._waiting = 1  # the piece may hold the end of a body too
        elif not self._of_use:
            self._trail(data)

    def _received_with_care(self, data: bytes) -> None:
        if self._refused:
            return
        before, self._suspect, self._of_use = self.scope, True, False
        super().data_received(data)
        self._suspect = False
        if not self._in_head():
            self._waiting = 0
            if not self._of_use:
                self._trail(data)
        elif self.scope is before:
            self._waiting += len(data)
        else:  # it began somewhere in this piece
            self._waiting = 1
        if self._waiting > MOST_BYTES and not self._refused:
            self._refuse()

    def _trail(self, data: bytes) -> None:
        """Count a piece between two parts of a body, or behind the last; what was asked for may have been answered by now."""
        self._trailing += len(data)
        if self._trailing > MOST_BYTES and not self._refused:
            log.warning("headers_too_large", client=self.client and self.client[0])
            self._refused = True
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        """Hand on a part of a body."""
        self._of_use, self._trailing = True, 0
        HttpToolsProtocol.on_body(self, body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._of_use, self._trailing = True, 0
        HttpToolsProtocol.on_message_complete(self)

    def _in_head(self) -> bool:
        """Whether a head has begun and is not complete."""
        return self.scope is not None and (self.cycle is None or self.cycle.scope is not self.scope)

    def on_headers_complete(self) -> None:
        """Begin with a request, unless its head is too large: what is raised here ends the parsing with `send_400_response`."""
        if self._suspect and len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MOST_BYTES:
            self._waiting = MOST_BYTES + 1  # for `send_400_response`
            raise ValueError("the request's head is too large")
        HttpToolsProtocol.on_headers_complete(self)

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be parsed."""
        if self._waiting > MOST_BYTES:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _refuse(self) -> None:
        log.warning("headers_too_large", client=self.client and self.client[0])
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:  # a request before it is still being answered
            self.cycle.keep_alive = False
            return
        error = HeadersTooLarge(f"a request's first line and headers may have {MOST_BYTES} bytes", maximum=MOST_BYTES)
        answer = problem(error, new_request_id())
        head = [STATUS_LINE[answer.status_code]]
        head += [b"%b: %b\r\n" % each for each in (*self.server_state.default_headers, *answer.raw_headers)]
        self.transport.write(b"".join((*head, b"\r\n", answer.body)))
        self.transport.write_eof()
        # Closed while the client sends, the connection would be reset, and the answer lost on its way.
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)
