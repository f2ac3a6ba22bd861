"""The data folder of a service: whose it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from forwardfill.cli import app


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "made for it" / "data"
    monkeypatch.setenv("FORWARDFILL_DATA", str(path))
    return path


def test_nobody_else_on_the_host_can_read_a_data_folder_that_was_made_for_a_service(data: Path) -> None:
    assert CliRunner().invoke(app, ["migrate"]).exit_code == 0
    assert data.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_there_already_stays_as_its_owner_made_it(data: Path) -> None:
    data.mkdir(parents=True)
    data.chmod(0o750)
    assert CliRunner().invoke(app, ["migrate"]).exit_code == 0
    assert data.stat().st_mode & 0o777 == 0o750
