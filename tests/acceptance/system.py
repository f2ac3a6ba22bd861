"""The service as real processes, and a client's view of it: nothing here imports the service."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx

from forwardfill.local_service import free_port

READY_SECONDS = 60.0


class Running(Protocol):
    """A process that was started: what we ask of `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...

    def terminate(self) -> None: ...


#: starts `forwardfill` with arguments and an environment, its output appended to a file
Spawn = Callable[[Sequence[str], Mapping[str, str], Path], Running]


def execute(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Running:
    """As an operator starts it."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "forwardfill", *arguments],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class Process:
    """One process of the system, with its output in a file."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], log: Path, spawn: Spawn = execute) -> None:
        self.arguments = arguments
        self.environment = {**os.environ, **environment}
        self.log = log
        self.spawn = spawn
        self.start()

    def start(self) -> None:
        self.popen = self.spawn(self.arguments, self.environment, self.log)

    def kill(self) -> None:
        """What `kill -9` does: no handler runs, nothing is flushed."""
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()

    def stop(self) -> int:
        """Ask it to end, and wait until it has."""
        if self.popen.poll() is None:
            self.popen.terminate()
        return self.popen.wait(timeout=60)


class Api(Process):
    """An API process, and an HTTP client for it."""

    def __init__(self, *options: str, environment: Mapping[str, str], log: Path, spawn: Spawn = execute) -> None:
        self.port = free_port()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        super().__init__(["serve", "--port", str(self.port), *options], environment, log, spawn)

    def start(self) -> None:
        super().start()
        self.wait_ready()

    def wait_ready(self) -> None:
        wait_for(self._ready, READY_SECONDS, lambda: f"{self.arguments} is not ready: {self.log.read_text()[-3000:]}")

    def stop(self) -> int:
        self.http.close()
        return super().stop()

    def _ready(self) -> bool:
        if self.popen.poll() is not None:
            raise AssertionError(f"it ended: {self.log.read_text()[-3000:]}")
        try:
            return self.http.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False


class System:
    """API processes and workers over one catalog and one data folder."""

    def __init__(
        self,
        folder: Path,
        *,
        database_url: str = "",
        broker_url: str = "",
        spawn: Spawn = execute,
        **settings: str,
    ) -> None:
        self.folder = folder
        self.spawn = spawn
        self.data = folder / "data"
        self.environment = {
            "FORWARDFILL_DATA": str(self.data),
            "FORWARDFILL_DATABASE_URL": database_url,
            "FORWARDFILL_BROKER_URL": broker_url,
            **{f"FORWARDFILL_{name.upper()}": value for name, value in settings.items()},
        }
        self.apis: list[Api] = []
        self.workers: list[Process] = []

    def migrate(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "forwardfill", "migrate"],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def add_api(self, *options: str) -> Api:
        log = self.folder / f"api-{len(self.apis)}.log"
        self.apis.append(Api(*options, environment=self.environment, log=log, spawn=self.spawn))
        return self.apis[-1]

    def add_worker(self) -> Process:
        log = self.folder / f"worker-{len(self.workers)}.log"
        self.workers.append(Process(["worker"], self.environment, log, self.spawn))
        return self.workers[-1]

    def stop(self) -> None:
        for process in (*self.workers, *self.apis):
            process.stop()


@contextmanager
def running(system: System) -> Iterator[System]:
    """Stop every process of a system at the end, whatever happens."""
    try:
        yield system
    finally:
        system.stop()


def children(pid: int) -> list[int]:
    """The processes that a process started, whichever of its threads did."""
    lists = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for each in lists for child in each.split()]


def command(pid: int) -> str:
    """The words with which a process was started, with a null after each."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


def wait_for(condition: Callable[[], Any], seconds: float, what: Callable[[], str], *, every: float = 0.02) -> Any:
    """Wait until a condition holds; its value. One that costs the service something is better not asked for all the time.

    The last look is after the time has passed, so that a machine that is busy for a while fails nothing that is so by then.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() >= end:
            raise AssertionError(f"after {seconds:g} s: {what()}")
        time.sleep(every)
    return value


def ok(response: httpx.Response) -> Any:
    """The body of an answer that must have succeeded."""
    assert response.is_success, (
        f"{response.request.method} {response.request.url}: {response.status_code} {response.text}"
    )
    return response.json()
