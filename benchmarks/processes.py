"""Servers as real processes of this machine, for as long as a `with` block runs; and what memory they hold."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

from forwardfill.local_service import free_port

START_SECONDS = 300.0
STOP_SECONDS = 60.0
#: how exactly a start is timed
LOOK_SECONDS = 0.005
SAMPLE_SECONDS = 0.1


class Server(NamedTuple):
    """A server that answers."""

    port: int
    pid: int
    #: seconds from the start of its process until it said that it was ready
    started_in: float

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def server(
    command: Callable[[int], Sequence[str]], ready: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a server.

    Args:
        command: its words, given the port to listen on.
        ready: a path that answers 200 once it is ready.
        log: where its output goes.
        environment: besides that of this process.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message has the end of its log.
    """
    port = free_port()
    begun = time.perf_counter()
    with process(command(port), log, environment) as started:
        _wait(started, port, ready, log)
        yield Server(port, started.pid, time.perf_counter() - begun)


@contextmanager
def process(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process, and stop it in good order at the end."""
    with log.open("ab") as out:
        started = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def end_in_good_order() -> None:
    """Let SIGTERM end this process as an exception does: every server that it started is then stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def service(folder: Path, settings: Mapping[str, object] | None = None, *, worker: bool = True) -> Iterator[Server]:
    """Forwardfill itself over a data folder, as `forwardfill serve` starts it, beside a worker unless told otherwise."""
    log, words = folder.with_suffix(".log"), ["serve", "--worker" if worker else "--no-worker"]
    said = _size(log)
    with server(
        lambda port: _forwardfill(*words, "--port", str(port)), "/health/ready", log, _environment(folder, settings)
    ) as running:
        if worker:
            _wait_for_worker(log, said)
        yield running


@contextmanager
def worker(
    folder: Path, settings: Mapping[str, object] | None = None, *, number: int = 0
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of its own over the same folder, at the priority of everything else; it is ready."""
    log = folder.with_suffix(f".worker{number}.log")
    said = _size(log)
    with process(_forwardfill("worker"), log, _environment(folder, settings)) as running:
        _wait_for_worker(log, said)
        yield running


def resident(pid: int) -> int:
    """Bytes of memory that a process and its children hold: private, and mapped files as far as they were touched.

    What several of them share is counted once (`Pss` of /proc/PID/smaps_rollup).
    """
    return _sum("Pss", _family(pid))


def private(pid: int) -> int:
    """Bytes of memory that a process and its children wrote themselves: what no file could give back (`Pss_Anon`)."""
    return _sum("Pss_Anon", _family(pid))


def processor_seconds(pid: int) -> float:
    """What processors a process has used since its start, in all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Peak:
    """The most private memory of a process while a `with` block runs."""

    def __init__(self, pid: int) -> None:
        """Watch a process and its children."""
        self.bytes = 0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, private(self._pid))


def _forwardfill(*words: str) -> list[str]:
    return [sys.executable, "-m", "forwardfill", *words]


def _environment(folder: Path, settings: Mapping[str, object] | None) -> dict[str, str]:
    values = {"DATA": folder, **{name.upper(): value for name, value in (settings or {}).items()}}
    return {f"FORWARDFILL_{name}": str(value) for name, value in values.items()}


def _wait(started: subprocess.Popen[bytes], port: int, ready: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _answers(port, ready):
        if started.poll() is not None or time.monotonic() > deadline:
            why = f"ended with code {started.returncode}" if started.poll() is not None else "is not ready"
            raise RuntimeError(f"{started.args!r} {why}: {log.read_text(errors='replace')[-3000:]}")
        time.sleep(LOOK_SECONDS)


def _wait_for_worker(log: Path, said: int) -> None:
    """Until a worker says that it has started: what it does before that is no part of what it is measured by."""
    deadline = time.monotonic() + START_SECONDS
    while b'"event":"worker_started"' not in log.read_bytes()[said:]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no worker has started: {log.read_text(errors='replace')[-3000:]}")
        time.sleep(LOOK_SECONDS)


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False  # it does not listen yet
    finally:
        connection.close()


def _family(pid: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            with suppress(OSError):  # it has just ended
                status = (each / "stat").read_text()
                parents[int(each.name)] = int(status.rpartition(")")[2].split()[1])
    found, before = {pid}, 0
    while len(found) > before:
        before = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def _sum(field: str, pids: Iterable[int]) -> int:
    total = 0
    for pid in pids:
        with suppress(OSError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += sum(int(size) * 1024 for size in re.findall(rf"^{field}: +(\d+) kB$", rollup, re.MULTILINE))
    return total
