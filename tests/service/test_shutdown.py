"""A process that is told to stop ends in its time, whatever is under way."""

from __future__ import annotations

import shutil
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine

from gallery.catalog.schema import migrate
from gallery.catalog.transaction import Catalog
from service.settings import ServiceSettings
from tests.acceptance.system import wait_for
from tests.service.served import PATIENCE_SECONDS, served
from tests.service.world import GALLERY, UNITS

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


@pytest.mark.timeout(120)
def test_a_search_that_takes_longer_than_the_shutdown_may_does_not_keep_the_process(
    tmp_path: Path, four_items: Path
) -> None:
    shutil.copytree(four_items, tmp_path / "data")
    with served(PROGRAM, tmp_path) as service:

        def search() -> None:
            body = {"model": "old", "vector": UNITS[0].tolist(), "k": 101}  # so many that a thread does it
            with suppress(httpx.TransportError):  # nobody waits for its answer
                service.client.post(f"/galleries/{GALLERY}/search", json=body)

        service.wait_ready()
        item = {"id": "late", "embedding": UNITS[0].tolist()}
        service.client.post(f"/galleries/{GALLERY}/items", json={"model": "old", "items": [item]}).raise_for_status()
        searching = threading.Thread(target=search)
        searching.start()
        wait_for(lambda: "SEARCHING" in service.log.read_text(), PATIENCE_SECONDS, service.log.read_text)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(timeout=ServiceSettings().shutdown_seconds) == 0
        searching.join(PATIENCE_SECONDS)
    said = service.log.read_text()
    assert "requests_abandoned" in said
    assert "RETURNED" not in said
    assert b"late" in b"".join(file.read_bytes() for file in (tmp_path / "data").glob("catalog.sqlite3*"))


@pytest.mark.timeout(120)
def test_a_request_that_is_not_waited_for_any_longer_is_told_so_as_every_refusal_is(tmp_path: Path) -> None:
    with served("from service.main import run; run()", tmp_path) as service:
        service.wait_ready()
        with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_SECONDS) as connection:
            head = (
                b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
            )
            connection.sendall(head + b"Expect: 100-continue\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100 ")  # so it is under way
            service.process.send_signal(signal.SIGTERM)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert service.process.wait(PATIENCE_SECONDS) == 0
    lines = answer.lower().split(b"\r\n")
    assert lines[0].startswith(b"http/1.1 503 "), answer
    assert b"content-type: application/problem+json" in lines
    assert any(line.startswith(b"retry-after: ") for line in lines)
    assert "Traceback" not in service.log.read_text(), "nothing went wrong that somebody could mend"


@pytest.mark.timeout(120)
def test_a_catalog_that_hangs_is_not_ready_and_does_not_keep_the_process(tmp_path: Path, postgres_url: str) -> None:
    catalog = Catalog(postgres_url)
    migrate(catalog)
    catalog.close()
    other = create_engine(postgres_url)
    program = "from service.main import run; run()"
    with served(program, tmp_path, FORWARDFILL_DATABASE_URL=postgres_url) as service:
        service.wait_ready()
        with other.connect() as connection:
            tables = "alembic_version, galleries, upgrades, api_keys"
            connection.exec_driver_sql(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE")
            assert [service.status() for _ in range(3)] == [503] * 3
            assert service.client.get("/health/live").status_code == 200
            assert "forwardfill_catalog_up 0.0" in service.client.get("/metrics").text.splitlines()
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(PATIENCE_SECONDS) == 0
    other.dispose()
    assert "last_words_lost" in service.log.read_text()
