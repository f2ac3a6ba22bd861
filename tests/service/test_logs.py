"""What a process writes is lines of JSON, whoever says it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from forwardfill.local_service import free_port
from tests.acceptance.system import wait_for

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
