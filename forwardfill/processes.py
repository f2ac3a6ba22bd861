"""The processes that `forwardfill serve` starts beside itself: a worker, and where several are asked for, API processes.

Each is started again if it dies, and ends with the process that started it.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import structlog

from gallery.settings import GallerySettings
from service.group import Group, reserved
from service.settings import ServiceSettings

log = structlog.get_logger()

_NICE = 10
_PR_SET_PDEATHSIG = 1
_RESTART_SECONDS = 1.0
# A worker that is told to stop finishes its segment; one that takes longer loses only time, since its lease expires.
_STOP_SECONDS = 30.0
# An API process hangs if it gave no sign of life at so many looks, a second apart. They count the seconds in which this process
# itself went on, so that nobody is ended because the whole host was suspended, or too busy for both.
_LOOK_SECONDS = 1.0
_SILENT_LOOKS = 30
# How long an API process may take to end in good order after its last request.
_ORDER_SECONDS = 10.0


@contextmanager
def worker_child() -> Iterator[None]:
    """Keep one worker running while the block runs, at low priority so that searches go first."""
    with _kept([_Child("worker", ["worker", "--nice", str(_NICE)])]):
        yield


def serve_together(settings: ServiceSettings, *, beside: Callable[[], AbstractContextManager[None]]) -> int:
    """Keep several API processes behind one port, until SIGTERM or SIGINT.

    Args:
        settings: of the service.
        beside: the worker: entered once the port is taken, left when the processes have ended.

    Returns:
        The exit status: 0, or that of a process that ended before it could serve: to start it again would be in vain.

    Raises:
        PortTakenError: the port is not free.
    """
    ended: SimpleQueue[int] = SimpleQueue()  # a signal's handler may put into it at any time
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.put(0))
    with reserved(settings.host, settings.port) as port, beside(), _group_folder() as folder:
        children = [
            _Child(
                f"api-{member.place}",
                ["serve", "--port", str(port), "--no-worker", "--group", str(folder), "--place", str(member.place)],
                alive=_pipe(),
                environment={"FORWARDFILL_THREADS": str(_threads_of_each(settings.processes))},
                stop_seconds=settings.shutdown_seconds + _ORDER_SECONDS,
                works=member.own_counts.exists,
                failed=ended.put,
            )
            for member in Group.made(folder, settings.processes)
        ]
        with _kept(children):
            status = _watched(children, ended)
    return status if status >= 0 else 128 - status  # ended by a signal: the status that a shell gives


def _watched(children: Sequence[_Child], ended: SimpleQueue[int]) -> int:
    """What is put into `ended`; children that hang meanwhile are ended, and so started again."""
    while True:
        with suppress(Empty):
            return ended.get(timeout=_LOOK_SECONDS)
        for child in children:
            child.look()


def heed_hangup() -> None:
    """Let SIGHUP stop this process as SIGTERM does: a terminal that closes, or who renamed a log, must not cut requests short.

    Where it is ignored, as below `nohup`, it stays so.
    """
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


def become_child(parent: int, niceness: int = 0) -> None:
    """Lower the priority, and make this process end with its parent, since nobody else would stop it.

    Raises:
        SystemExit: the parent has ended already.
    """
    os.nice(niceness)
    # This process is in the terminal's background, and must be able to write there also after `stty tostop`.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        raise SystemExit(1)


def _threads_of_each(processes: int) -> int:
    """Threads of one search: what a single process would use is divided among the processes."""
    settings = GallerySettings()
    return settings.threads or max(1, settings.threads_used // processes)


def _pipe() -> tuple[int, int]:
    """A pipe that makes nobody wait, open for as long as this process lives."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    return reader, writer


@contextmanager
def _group_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="forwardfill-") as folder:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # cleaners of temporary files leave locked folders alone
            yield Path(folder)
        finally:
            os.close(handle)


@contextmanager
def _kept(children: Sequence[_Child]) -> Iterator[None]:
    for child in children:
        child.start()
    try:
        yield
    finally:
        for child in children:
            child.tell()
        for child in children:
            child.wait()


@dataclass
class _Child:
    """A process of ours that is kept running."""

    name: str
    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_seconds: float = _STOP_SECONDS
    #: whether a process under this name ever did its work; if one ends before that, it is not started again
    works: Callable[[], bool] = lambda: True
    #: called with the exit status of a process that is not started again
    failed: Callable[[int], None] = lambda _: None
    #: both ends of a pipe into which a process under this name writes as long as it does not hang; None if it is not looked at
    alive: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self._stopping, self._until = threading.Event(), math.inf
        self._process: subprocess.Popen[bytes] | None = None
        self._looked_at: subprocess.Popen[bytes] | None = None
        self._silent = -math.inf
        self._thread = threading.Thread(target=self._keep, name=self.name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def look(self) -> None:
        """End it if it hangs. Until its first sign of life it cannot: a start takes as long as the galleries are large."""
        assert self.alive is not None  # noqa: S101 - only those are looked at
        process = self._process
        signs = b""
        with suppress(BlockingIOError):
            signs = os.read(self.alive[0], 1 << 16)
        if process is None or process is not self._looked_at:  # the signs may be of the one before
            self._looked_at, self._silent = process, -math.inf
            return
        self._silent = 0 if signs else self._silent + 1
        if self._silent == _SILENT_LOOKS:
            log.warning("process_hung", process=self.name, pid=process.pid, seconds=_SILENT_LOOKS * _LOOK_SECONDS)
            process.kill()

    def tell(self) -> None:
        """Tell it to stop, and do not wait."""
        self._until = time.monotonic() + self.stop_seconds
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait(self) -> None:
        """Wait until it has stopped; kill it if it takes too long."""
        self._thread.join(timeout=max(0.0, self._until - time.monotonic()))
        if self._process is not None and self._process.poll() is None:
            log.warning("process_killed", process=self.name, pid=self._process.pid)
            self._process.kill()
            self._process.wait()

    def _keep(self) -> None:
        # The kernel ends the child when the thread that started it ends (`become_child`), so this thread stays as long.
        while not self._stopping.is_set():
            try:
                code = self._run()
            except OSError as error:  # there may be enough memory for it later
                log.warning("process_not_started", process=self.name, error=repr(error))
            else:
                if code is not None and not self.works():
                    self.failed(code)
                    return
            self._stopping.wait(_RESTART_SECONDS)

    def _run(self) -> int | None:
        """Start it and wait until it ends. Returns its exit status, or None if it was told to stop."""
        started = time.monotonic()
        self._process = self._spawn()
        if self._stopping.is_set():  # `tell` may have come while the process was being made
            self._process.terminate()
        code = self._process.wait()
        if self._stopping.is_set():
            return None
        log.warning("process_died", process=self.name, code=code, seconds=round(time.monotonic() - started, 1))
        return code

    def _spawn(self) -> subprocess.Popen[bytes]:
        # A process group of its own, so that Ctrl-C in a terminal reaches only the parent, which then stops its children in good
        # order. No session of its own: Linux divides the processors among sessions first (sched(7), autogroup), and a worker's
        # low priority would not help the API.
        passed = [] if self.alive is None else [self.alive[1]]
        alive = [] if self.alive is None else ["--alive", str(self.alive[1])]
        return subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "forwardfill", *self.words, *alive, "--parent", str(os.getpid())],
            env={**os.environ, **self.environment},
            pass_fds=passed,
            process_group=0,
        )
