"""Run the application until it is told to stop."""

from __future__ import annotations

import gc
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from service.process import Process
from service.protocol import Protocol

log = structlog.get_logger()

_SWITCH_SECONDS = 0.001
# A request on a connection that is closed at the same moment gets no answer. So connections are kept for longer than clients
# keep them: clients in Python for 5 s, which is also uvicorn's default, and proxies for 60 s.
_KEEP_ALIVE_SECONDS = 75


class _Server(uvicorn.Server):
    """Says when it serves, and where. Ends event streams as soon as the signal comes: uvicorn waits for open answers, and those
    would never end.
    """

    def __init__(self, config: uvicorn.Config, early: Sequence[int]) -> None:
        """Serve; `early` are the signals that came before uvicorn listens to them."""
        super().__init__(config)
        self._early = early

    async def main_loop(self) -> None:
        """Serve until a signal comes, or at once to the end if it came while the process was about to serve."""
        for number in self._early:
            self.handle_exit(number, None)
        await super().main_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if self.started:
            log.info("serving", addresses=[_as_url(each.getsockname()) for each in sockets or ()])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take the signal."""
        process: Process = self.config.app.state.process  # type: ignore[union-attr]
        process.closing = True
        super().handle_exit(sig, frame)


def run(app: FastAPI, sockets: Sequence[socket.socket]) -> None:
    """Serve on sockets that are bound; returns after SIGTERM or SIGINT, with no request cut short.

    Call `service.ready.make_ready` before, and `service.telemetry.configure_logs`.
    """
    # When it has ended, uvicorn raises the signal again for whoever had it before. Here that is nobody: the caller has
    # more to put in order, and the default would end the process on the spot. One that comes before uvicorn listens is kept.
    early = list[int]()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda which, _: early.append(which))
    _share_the_interpreter()
    server = _Server(configured(app), early)
    server.run(list(sockets))


def configured(app: FastAPI) -> uvicorn.Config:
    """How uvicorn is to serve it."""
    settings = app.state.process.settings
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Protocol,
        access_log=False,  # `Telemetry` logs each request
        log_config=None,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )


def _as_url(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _share_the_interpreter() -> None:
    """Let no thread keep the event loop waiting for longer than it must.

    A thread that runs Python gives way this long after it is asked to; the default is 5 ms. What was imported stays for
    good, and need not be walked over by each full collection, during which nothing else runs.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.freeze()
