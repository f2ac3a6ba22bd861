"""The README's walk-through does what it says, on a service that was just installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from forwardfill.local_service import LocalService
from tests.acceptance.system import wait_for

ROOT = Path(__file__).resolve().parents[2]
#: what `source .venv/bin/activate` puts before the others
BIN = Path(sys.executable).parent
PATIENCE_SECONDS = 90.0


@pytest.fixture
def api(tmp_path: Path) -> Iterator[str]:
    """The address of an embedded service with an empty data folder."""
    with LocalService(tmp_path / "data", tmp_path / "log", {}) as service:
        yield service.url


def walk_through() -> str:
    section = (ROOT / "README.md").read_text().partition("## How to use it")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))


@pytest.mark.acceptance
def test_the_walk_through_of_the_readme_upgrades_a_gallery(api: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", walk_through()],
        cwd=tmp_path,
        env=os.environ | {"API": api, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr

    answers = [json.loads(line) for line in ran.stdout.splitlines() if line.strip()]
    before, during = (answer for answer in answers if "hits" in answer)
    assert [hit["id"] for hit in before["hits"]] == ["shoe"], "the hat costs too much"
    assert [hit["id"] for hit in during["hits"]] == ["shoe", "hat"]
    assert during["served"]["score_space"] == "new"

    (upgrade,) = (answer for answer in answers if "progress" in answer)
    url = f"{api}/admin/upgrades/{upgrade['id']}"
    wait_for(lambda: httpx.get(url).json()["state"] == "completed", PATIENCE_SECONDS, lambda: httpx.get(url).text)
