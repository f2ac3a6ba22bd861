"""The embedded default: the API process with one worker as its child, at low CPU priority so that searches go first."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

log = structlog.get_logger()

_NICE = 10
_PR_SET_PDEATHSIG = 1
_RESTART_SECONDS = 1.0
# A worker that is told to stop finishes its segment; one that takes longer loses only time, since its lease expires.
_STOP_SECONDS = 30.0


@contextmanager
def worker_child() -> Iterator[None]:
    """Keep one worker running while the block runs; start it again if it dies."""
    child = _Child()
    child.start()
    try:
        yield
    finally:
        child.stop()


class _Child:
    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="worker-child", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        self._thread.join(timeout=_STOP_SECONDS)
        if self._process is not None and self._process.poll() is None:
            log.warning("worker_killed", pid=self._process.pid)
            self._process.kill()
            self._process.wait()

    def _keep(self) -> None:
        while not self._stopping.is_set():
            started = time.monotonic()
            self._process = _spawn()
            if self._stopping.is_set():  # `stop` may have come while the process was being made
                self._process.terminate()
            code = self._process.wait()
            if not self._stopping.is_set():
                log.warning("worker_died", code=code, seconds=round(time.monotonic() - started, 1))
                self._stopping.wait(_RESTART_SECONDS)


def _spawn() -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C in a terminal reaches the parent only, which then tells the worker in good order.
    return subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", "forwardfill.cli", "worker", "--parent", str(os.getpid())], start_new_session=True
    )


def become_child(parent: int) -> None:
    """Lower the priority, and die with the parent: an embedded worker without its API process serves nobody."""
    os.nice(_NICE)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        raise SystemExit(1)
