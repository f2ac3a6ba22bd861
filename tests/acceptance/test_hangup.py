"""SIGHUP, which comes where a terminal closes or a log is rotated, ends a process in good order and cuts nothing short."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest

from tests.acceptance.forks import Nursery
from tests.acceptance.system import System, children, ok, running, wait_for

BODY = b'{"name": "late", "dimension": 4, "metric": "cosine", "normalized": false}'
HEAD = b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(
    BODY
)


@pytest.fixture
def system(tmp_path: Path, nursery: Nursery) -> System:
    return System(tmp_path, spawn=nursery.spawn)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_service_that_is_hung_up_answers_what_is_under_way_and_ends_with_its_children(
    system: System, processes: str
) -> None:
    with running(system):
        api = system.add_api("--processes", processes)
        started = wait_for(lambda: children(api.popen.pid), 60, lambda: "it has no child")
        with socket.create_connection(("127.0.0.1", api.port), timeout=60) as connection:
            connection.sendall(HEAD + b"Expect: 100-continue\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100 ")  # so it is under way
            api.popen.send_signal(signal.SIGHUP)
            connection.sendall(BODY)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 201 "), answer
        assert api.popen.wait(60) == 0
        wait_for(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), 60, lambda: f"of {started} one goes on"
        )


def test_a_worker_that_is_hung_up_ends(system: System) -> None:
    with running(system):
        api = system.add_api("--no-worker")
        ok(api.http.post("/models", json=json.loads(BODY)))
        ok(api.http.post("/galleries", json={"name": "photos", "model": "late"}))
        ok(api.http.post("/admin/galleries/photos/compact"))
        messages = system.data / "broker" / "messages"
        wait_for(lambda: any(messages.iterdir()), 60, lambda: "no worker is told")
        worker = system.add_worker()
        # Celery has its handlers before it takes the first message.
        wait_for(lambda: not any(messages.iterdir()), 60, worker.log.read_text)
        worker.popen.send_signal(signal.SIGHUP)
        assert worker.popen.wait(60) == 0
