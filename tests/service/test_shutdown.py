"""A process that is told to stop ends in its time, whatever is under way."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine

from forwardfill.local_service import free_port
from gallery.catalog.schema import migrate
from gallery.catalog.transaction import Catalog
from service.settings import ServiceSettings
from tests.acceptance.system import wait_for
from tests.service.world import GALLERY, UNITS

PATIENCE_SECONDS = 60.0
#: the service, with a search that says that it has begun, and then takes as long as it is let
PROGRAM = """
import time
from gallery.search.run import Searcher
from service.main import run

def search(*_, **__):
    print("SEARCHING", flush=True)
    time.sleep(600)

Searcher.search = search
run()
print("RETURNED", flush=True)
"""


def started(program: str, folder: Path, port: int, log: Path, **more: str) -> subprocess.Popen[bytes]:
    """A service that waits a second for requests under way when it is told to stop."""
    environment = {
        **os.environ,
        **more,
        "FORWARDFILL_DATA": str(folder / "data"),
        "FORWARDFILL_PORT": str(port),
        "FORWARDFILL_SHUTDOWN_SECONDS": "1",
    }
    with log.open("wb") as out:
        return subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=out, stderr=out)


@pytest.mark.timeout(120)
def test_a_search_that_takes_longer_than_the_shutdown_may_does_not_keep_the_process(
    tmp_path: Path, four_items: Path
) -> None:
    shutil.copytree(four_items, tmp_path / "data")
    port, log = free_port(), tmp_path / "log"
    process = started(PROGRAM, tmp_path, port, log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_SECONDS) as client:

            def ready() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    return client.get("/health/ready").is_success
                except httpx.TransportError:
                    return False

            def search() -> None:
                body = {"model": "old", "vector": UNITS[0].tolist(), "k": 101}  # so many that a thread does it
                with suppress(httpx.TransportError):  # nobody waits for its answer
                    client.post(f"/galleries/{GALLERY}/search", json=body)

            wait_for(ready, PATIENCE_SECONDS, log.read_text)
            item = {"id": "late", "embedding": UNITS[0].tolist()}
            client.post(f"/galleries/{GALLERY}/items", json={"model": "old", "items": [item]}).raise_for_status()
            searching = threading.Thread(target=search)
            searching.start()
            wait_for(lambda: "SEARCHING" in log.read_text(), PATIENCE_SECONDS, log.read_text)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=ServiceSettings().shutdown_seconds) == 0
            searching.join(PATIENCE_SECONDS)
    finally:
        process.kill()
        process.wait()
    said = log.read_text()
    assert "requests_abandoned" in said
    assert "RETURNED" not in said
    assert b"late" in b"".join(file.read_bytes() for file in (tmp_path / "data").glob("catalog.sqlite3*"))


@pytest.mark.timeout(120)
def test_a_request_that_is_not_waited_for_any_longer_is_told_so_as_every_refusal_is(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    process = started("from service.main import run; run()", tmp_path, port, log)

    def connected() -> socket.socket | None:
        assert process.poll() is None, log.read_text()
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
        except ConnectionRefusedError:
            return None

    try:
        with wait_for(connected, PATIENCE_SECONDS, log.read_text) as connection:
            head = (
                b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
            )
            connection.sendall(head + b"Expect: 100-continue\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100 ")  # so it is under way
            process.send_signal(signal.SIGTERM)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
    lines = answer.lower().split(b"\r\n")
    assert lines[0].startswith(b"http/1.1 503 "), answer
    assert b"content-type: application/problem+json" in lines
    assert any(line.startswith(b"retry-after: ") for line in lines)
    assert "Traceback" not in log.read_text(), "nothing went wrong that somebody could mend"


@pytest.mark.timeout(120)
def test_a_catalog_that_hangs_is_not_ready_and_does_not_keep_the_process(tmp_path: Path, postgres_url: str) -> None:
    port, log = free_port(), tmp_path / "log"
    catalog = Catalog(postgres_url)
    migrate(catalog)
    catalog.close()
    process = started("from service.main import run; run()", tmp_path, port, log, FORWARDFILL_DATABASE_URL=postgres_url)
    other = create_engine(postgres_url)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_SECONDS) as client:

            def status() -> int:
                assert process.poll() is None, log.read_text()
                try:
                    return client.get("/health/ready").status_code
                except httpx.TransportError:
                    return 0

            wait_for(lambda: status() == 200, PATIENCE_SECONDS, log.read_text)
            with other.connect() as connection:
                tables = "alembic_version, galleries, upgrades, api_keys"
                connection.exec_driver_sql(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE")
                assert [status() for _ in range(3)] == [503] * 3
                assert client.get("/health/live").status_code == 200
                assert "forwardfill_catalog_up 0.0" in client.get("/metrics").text.splitlines()
                process.send_signal(signal.SIGTERM)
                assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
        other.dispose()
    assert "last_words_lost" in log.read_text()
