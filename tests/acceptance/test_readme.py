"""The README's walk-through does what it says, on a service that was just installed."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 90.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def api(tmp_path: Path) -> Iterator[str]:
    """The address of an embedded service with an empty data folder."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORWARDFILL_")}
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("forwardfill"), "serve", "--port", str(port)],
            env=environment | {"FORWARDFILL_DATA": str(tmp_path / "data")},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: is_ready(url) or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "serve.log").read_text()
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").is_success
    except httpx.TransportError:
        return False


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def walk_through() -> str:
    section = (ROOT / "README.md").read_text().partition("## How to use it")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))


@pytest.mark.acceptance
def test_the_walk_through_of_the_readme_upgrades_a_gallery(api: str, tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)  # the walk-through names .venv/bin/python
    ran = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", walk_through()],
        cwd=tmp_path,
        env=os.environ | {"API": api},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr

    answers = [json.loads(line) for line in ran.stdout.splitlines() if line.strip()]
    before, during = (answer for answer in answers if "hits" in answer)
    assert [hit["id"] for hit in before["hits"]] == ["shoe"], "the hat is too dear"
    assert [hit["id"] for hit in during["hits"]] == ["shoe", "hat"]
    assert during["served"]["score_space"] == "new"

    (upgrade,) = (answer for answer in answers if "progress" in answer)
    wait_until(lambda: httpx.get(f"{api}/admin/upgrades/{upgrade['id']}").json()["state"] == "completed")
