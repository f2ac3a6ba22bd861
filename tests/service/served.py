"""A service that a program of the test's own runs, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from forwardfill.local_service import free_port
from tests.acceptance.system import wait_for

PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Served:
    """The process, and how it is asked."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    client: httpx.Client

    def status(self) -> int:
        """Of `/health/ready`; 0 while it does not listen."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.client.get("/health/ready").status_code
        except httpx.TransportError:
            return 0

    def wait_ready(self) -> None:
        """Until it can be searched."""
        wait_for(lambda: self.status() == 200, PATIENCE_SECONDS, self.log.read_text)


@contextmanager
def served(program: str, folder: Path, **environment: str) -> Iterator[Served]:
    """Run a program over `folder/data`, killed in the end. Told to stop, it waits a second for requests under way."""
    port, log = free_port(), folder / "log"
    settings = {
        "FORWARDFILL_DATA": str(folder / "data"),
        "FORWARDFILL_PORT": str(port),
        "FORWARDFILL_SHUTDOWN_SECONDS": "1",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, **environment, **settings}, stdout=out, stderr=out
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_SECONDS) as client:
            yield Served(process, port, log, client)
    finally:
        process.kill()
        process.wait()
