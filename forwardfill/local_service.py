"""The service and its worker as real processes on this machine, for as long as a `with` block runs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import httpx

START_SECONDS = 120.0
STOP_SECONDS = 40.0
LOOK_SECONDS = 0.1
TAIL_LINES = 25
_ANSWERED = re.compile(r'"status":[1-4]\d\d,.*"event":"request"')


class ServiceDiedError(Exception):
    """The service did not start, or ended by itself; the message holds the end of its log."""


class LocalService:
    """`forwardfill serve` on a free port, with its own data folder and nothing else from this process's settings."""

    def __init__(self, data: Path, log: Path, settings: Mapping[str, object]) -> None:
        """Prepare to start.

        Args:
            data: where it keeps everything.
            log: where its output goes, and its worker's.
            settings: more of them, without the prefix, such as `{"MAX_K": 2000}`.
        """
        self._log = log
        self._port = free_port()
        others = {name: value for name, value in os.environ.items() if not name.startswith("FORWARDFILL_")}
        ours = {f"FORWARDFILL_{name}": str(value) for name, value in {**settings, "DATA": data.absolute()}.items()}
        # Half of the cores, because its clients and its worker compute on this machine too: a matrix product whose threads have
        # to wait for cores that others use takes many times as long as on one thread.
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
        self._environment = {**threads, **others, **ours}

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = self._start(log)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Make sure that it still runs.

        Raises:
            ServiceDiedError: it does not.
        """
        code = self._process.poll()
        if code is not None:
            raise ServiceDiedError(f"the service ended with code {code}; the end of {self._log}:\n{self.tail()}")

    def tail(self) -> str:
        """The end of its log, without the lines of requests that went well."""
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join([line for line in lines if line and not _ANSWERED.search(line)][-TAIL_LINES:])

    def stop(self) -> None:
        """Let it finish what it does, and end it; once is enough."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()  # its worker is told by the kernel, and ends too
                self._process.wait()

    def _start(self, log: BinaryIO) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "forwardfill", "serve", "--port", str(self._port)],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process only, which then stops it in good order
        )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        with httpx.Client(base_url=self.url, timeout=5.0, trust_env=False) as http:  # past any proxy
            while True:
                self.check()
                try:
                    if http.get("/health/ready").is_success:
                        return
                except httpx.TransportError:
                    pass  # it does not listen yet
                if time.monotonic() > deadline:
                    raise ServiceDiedError(f"not ready after {START_SECONDS:.0f} s; its log ends:\n{self.tail()}")
                time.sleep(LOOK_SECONDS)


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
