"""What a process writes is lines of JSON, whoever says it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from forwardfill.client import Client
from forwardfill.local_service import free_port
from models import artifacts
from models.transformations import Linear, build
from tests.acceptance.system import Spawn, System, children, command, running, wait_for

PATIENCE_SECONDS = 60.0


@pytest.mark.timeout(120)
def test_what_the_http_server_says_is_json_too_and_said_once_and_repeats_nothing_of_a_request(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    environment = {**os.environ, "FORWARDFILL_DATA": str(tmp_path / "data"), "FORWARDFILL_PORT": str(port)}
    program = [sys.executable, "-c", "from service.main import run; run()"]
    with log.open("wb") as out:
        process = subprocess.Popen(program, env=environment, stdout=out, stderr=out)

    def answer() -> bytes:
        assert process.poll() is None, log.read_text()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as connection:
                connection.sendall(b"SECRET /?key=SECRET HTTP/1.1\r\n\r\n")
                return connection.recv(1 << 16)
        except ConnectionRefusedError:
            return b""

    try:
        assert wait_for(answer, PATIENCE_SECONDS, log.read_text).startswith(b"HTTP/1.1 400 ")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
    said = [json.loads(line) for line in log.read_text().splitlines()]
    (line,) = (each for each in said if "Invalid HTTP request" in str(each))
    assert (line["event"], line["logger"], line["level"]) == ("library", "uvicorn.error", "warning")
    assert "SECRET" not in log.read_text()


@pytest.mark.timeout(120)
def test_what_the_queues_library_says_is_json_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    broker = "redis://:SECRET@127.0.0.1:1/0"  # nobody is there, which is worth a warning
    environment = {**os.environ, "FORWARDFILL_DATA": str(tmp_path / "data"), "FORWARDFILL_BROKER_URL": broker}
    program = [sys.executable, "-m", "forwardfill"]
    subprocess.run([*program, "migrate"], env=environment, check=True)  # or the worker waits for it, and asks no queue
    with log.open("wb") as out:
        process = subprocess.Popen([*program, "worker"], env=environment, stdout=out, stderr=out)
    try:
        wait_for(lambda: "Cannot connect" in log.read_text(), PATIENCE_SECONDS, log.read_text)
    finally:
        process.kill()
        process.wait()
    said = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"event": "library", "logger": "celery.worker.consumer.consumer", "level": "error"}.items() <= said[
        -1
    ].items()
    assert "SECRET" not in log.read_text()


@pytest.mark.timeout(120)
def test_a_service_says_where_it_serves_and_one_whose_port_is_taken_says_so_before_it_starts_a_worker(
    tmp_path: Path,
) -> None:
    def serve(port: str, log: Path) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "FORWARDFILL_DATA": str(tmp_path / log.name / "data")}
        log.mkdir()
        with (log / "log").open("wb") as out:
            program = [sys.executable, "-m", "forwardfill", "serve", "--port", port]
            return subprocess.Popen(program, env=environment, stdout=out, stderr=out)

    def addresses() -> list[str]:
        lines = [json.loads(line) for line in (tmp_path / "first" / "log").read_text().splitlines()]
        return [url for line in lines if line["event"] == "serving" for url in line["addresses"]]

    first = serve("0", tmp_path / "first")
    try:
        (url,) = wait_for(addresses, PATIENCE_SECONDS, lambda: "it does not say where it serves")
        with Client(url) as client:
            assert client.health() == {"status": "ok"}
        port = url.rpartition(":")[2]
        second = serve(port, tmp_path / "second")
        assert second.wait(PATIENCE_SECONDS) == 2
        assert (
            tmp_path / "second" / "log"
        ).read_text() == f"cannot listen on 127.0.0.1:{port}: Address already in use\n"
    finally:
        first.terminate()
        assert first.wait(PATIENCE_SECONDS) == 0


FULL = Path("/dev/full")
PROGRAM = [sys.executable, "-m", "forwardfill"]


def on_a_full_disk(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    log.touch()
    with FULL.open("wb", buffering=0) as out:
        return started([*PROGRAM, *arguments], environment, out)


def with_its_output_closed(
    arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    log.touch()
    with log.open("ab") as out:
        return started(["sh", "-c", 'exec "$0" "$@" >&- 2>&-', *PROGRAM, *arguments], environment, out)


def into_a_pipe_whose_reader_stopped(
    arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    log.touch()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while os.write(writer, b"\n"):
            pass
    os.set_blocking(writer, True)
    _UNREAD.append(os.fdopen(reader, "rb", buffering=0))
    with os.fdopen(writer, "wb", buffering=0) as out:
        return started([*PROGRAM, *arguments], environment, out)


#: readers of pipes, which must not be closed
_UNREAD: list[IO[bytes]] = []


def started(program: Sequence[str], environment: Mapping[str, str], out: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(program, env=environment, stdout=out, stderr=out, start_new_session=True)


@pytest.fixture(autouse=True)
def _no_readers_are_left() -> Iterator[None]:
    yield
    while _UNREAD:
        _UNREAD.pop().close()


@pytest.mark.parametrize(
    "spawn",
    [
        pytest.param(
            on_a_full_disk,
            marks=pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full"),
        ),
        with_its_output_closed,
        into_a_pipe_whose_reader_stopped,
    ],
)
@pytest.mark.timeout(240)
def test_a_log_that_cannot_be_written_loses_lines_and_nothing_else(tmp_path: Path, spawn: Spawn) -> None:
    """No request fails for it, a worker starts, and one that is killed is started again."""
    artifacts.save(tmp_path / "forward.safetensors", build(Linear(source_dimension=4, target_dimension=4)))
    vectors = np.eye(4, dtype=np.float32)
    with running(System(tmp_path, spawn=spawn)) as system:
        api = system.add_api()

        def worker() -> int | None:
            return next((pid for pid in children(api.popen.pid) if "\0worker\0" in command(pid)), None)

        with Client(str(api.http.base_url)) as client:
            for name in ("old", "new"):
                client.register_model(name, dimension=4, metric="euclidean")
            digest = client.upload_artifact(tmp_path / "forward.safetensors")
            client.register_transformation("forward", source="old", target="new", artifact=digest, method="affine")
            client.create_gallery("photos", "old")
            client.upsert("photos", "old", ids=["a", "b", "c", "d"], embeddings=vectors)
            for turn in range(40):
                found = client.search(
                    "photos", "old", vectors[turn % 4], k=1, filter=None if turn % 2 else {"none": {"exists": False}}
                )
                assert found["hits"][0]["id"] == "abcd"[turn % 4]
            first = wait_for(worker, 60, lambda: "no worker was started")
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: worker() not in (None, first), 60, lambda: "no worker was started again")
            started = client.start_upgrade("photos", transformation="forward")["id"]
            assert client.wait(started, timeout=120)["state"] == "completed"


@pytest.mark.timeout(120)
def test_whoever_stopped_reading_the_log_finds_whole_lines_when_he_goes_on(tmp_path: Path) -> None:
    with running(System(tmp_path, spawn=into_a_pipe_whose_reader_stopped)) as system:
        api = system.add_api("--no-worker")
        assert api.http.get("/galleries").status_code == 200
        (reader,) = _UNREAD
        os.set_blocking(reader.fileno(), False)
        while reader.read(1 << 16):
            pass
        os.set_blocking(reader.fileno(), True)
        assert api.http.get("/galleries", headers={"x-request-id": "read"}).status_code == 200
        ids = list[str]()
        while "read" not in ids:  # of the request before there may be a line, too: it is written after the answer
            ids += [json.loads(line).get("request_id") for line in reader.read(1 << 16).splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="whether a process has a handler is asked of /proc")
@pytest.mark.timeout(120)
def test_a_worker_stops_although_nobody_reads_its_log(tmp_path: Path) -> None:
    system = System(tmp_path, spawn=into_a_pipe_whose_reader_stopped)
    system.migrate()
    worker = system.add_worker()
    status = Path(f"/proc/{worker.popen.pid}/status")

    def handles_sigterm() -> bool:
        (caught,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    try:
        wait_for(handles_sigterm, PATIENCE_SECONDS, lambda: "it never began to work")
        assert worker.stop() == 0
    finally:
        worker.kill()
