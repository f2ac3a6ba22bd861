"""The README's walk-through and its Python example do what they say, on a service that was just installed."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from forwardfill.local_service import LocalService
from tests.acceptance.system import wait_for

ROOT = Path(__file__).resolve().parents[2]
#: what `source .venv/bin/activate` puts before the others
BIN = Path(sys.executable).parent
PATIENCE_SECONDS = 90.0


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an embedded service with an empty data folder."""
    folder = tmp_path_factory.mktemp("service")
    with LocalService(folder / "data", folder / "log", {}) as service:
        yield service.url


def code(language: str) -> str:
    """What the README's section on how to use it tells a reader to run."""
    section = (ROOT / "README.md").read_text().partition("## How to use it")[2].partition("\n## ")[0]
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL))


@pytest.fixture(scope="module")
def answers(api: str, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the shell's walk-through was answered."""
    ran = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", code("bash")],
        cwd=tmp_path_factory.mktemp("reader"),
        env=os.environ | {"API": api, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines() if line.strip()]


@pytest.mark.acceptance
def test_the_walk_through_of_the_readme_upgrades_a_gallery(api: str, answers: list[Any]) -> None:
    before, during = (answer for answer in answers if "hits" in answer)
    assert [hit["id"] for hit in before["hits"]] == ["shoe"], "the hat costs too much"
    assert [hit["id"] for hit in during["hits"]] == ["shoe", "hat"]
    assert during["served"]["score_space"] == "new"

    (upgrade,) = (answer for answer in answers if "progress" in answer)
    url = f"{api}/admin/upgrades/{upgrade['id']}"
    wait_for(lambda: httpx.get(url).json()["state"] == "completed", PATIENCE_SECONDS, lambda: httpx.get(url).text)


@pytest.mark.acceptance
@pytest.mark.usefixtures("answers")
def test_the_python_example_of_the_readme_finds_the_item_that_it_stored(api: str) -> None:
    example = code("python").replace("http://127.0.0.1:8000", api)
    ran = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    (hit,) = ast.literal_eval(ran.stdout)
    assert (hit["id"], hit["origin"], hit["payload"]) == ("bag", "native", {"price": 60})
