"""What commands print: results and refusals apart, and every character as it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from forwardfill.cli import app
from forwardfill.tables import listed
from service.keys import create_key
from service.names import NAME
from tests.service.world import opened


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDFILL_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("FORWARDFILL_API_KEY", raising=False)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def test_the_package_itself_is_the_command_line() -> None:
    asked = [sys.executable, "-m", "forwardfill", "keys", "--help"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert "python -m forwardfill keys" in told
    assert "revoke" in told


@pytest.mark.parametrize("package", ["forwardfill", "models"])
def test_a_command_line_tells_the_version_that_is_installed(package: str) -> None:
    asked = [sys.executable, "-m", package, "--version"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert told == f"forwardfill {version('forwardfill')}\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The command as pip installs it, alone in a folder."""
    made = tmp_path / "bin" / "forwardfill"
    made.parent.mkdir()
    made.write_text(f"#!{sys.executable}\nfrom forwardfill.__main__ import main\nmain()\n")
    made.chmod(0o755)
    return made


def in_bash(script: Path, commands: str) -> str:
    environment = os.environ | {
        "PATH": os.pathsep.join([str(script.parent), os.environ["PATH"]]),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return subprocess.run(["bash", "-c", commands], capture_output=True, text=True, env=environment, check=True).stdout


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("forwardfill gal", ["galleries"]),
        ("forwardfill galleries s", ["show", "set-probes"]),
        ("forwardfill gc --d", ["--delete", "--data"]),
    ],
)
def test_bash_completes_commands_and_options_without_pytorch_and_sqlalchemy(
    script: Path, words: str, offered: list[str]
) -> None:
    completed = in_bash(
        script,
        f"""
        eval "$(forwardfill --show-completion)"
        COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        export PYTHONPROFILEIMPORTTIME=1
        _forwardfill_completion forwardfill 2> '{script}.imported'
        printf '%s\n' "${{COMPREPLY[@]}}"
        """,
    )
    assert sorted(completed.split()) == sorted(offered)
    imported = Path(f"{script}.imported").read_text()
    assert "forwardfill.cli" in imported
    assert not re.search(r"\b(torch|faiss|pyarrow|sqlalchemy|alembic)\b", imported)


def test_completion_is_not_offered_where_it_would_be_that_of_python() -> None:
    asked = [sys.executable, "-m", "forwardfill", "--help"]
    assert "completion" not in subprocess.run(asked, capture_output=True, text=True, check=True).stdout


def test_a_key_is_all_that_the_output_has() -> None:
    made = run("keys", "create", "--name", "one")
    assert made.exit_code == 0, made.output
    assert made.stdout.startswith("ffk_")
    assert len(made.stdout.split()) == 1
    assert made.stderr == ""


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("where", [f"> {FULL}", ">&-", "| true"])
def test_a_key_that_could_not_be_told_is_said_to_be_stored_and_how_it_is_revoked(where: str) -> None:
    made = f"set -o pipefail; '{sys.executable}' -m forwardfill keys create --name one {where}"
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    ended = subprocess.run(["bash", "-c", made], capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "the key one is stored, but nobody saw it" in ended.stderr
    assert "forwardfill keys revoke one" in ended.stderr
    assert "ffk_" not in ended.stderr
    assert run("keys", "revoke", "one").exit_code == 0


@pytest.mark.parametrize("name", ["Bad Name", "[/x]", "[red]", ":smiley:"])
def test_a_refusal_goes_to_the_error_stream_in_one_line_with_every_bracket(name: str) -> None:
    refused = run("keys", "create", "--name", name)
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert refused.stderr == f"a key's name fits {NAME}, and {name!r} does not\n"


def test_what_is_listed_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    listed([{"error": "[red]a[/red]"}], "error")
    assert "[red]a[/red]" in capsys.readouterr().out


LONG = [{"id": "01JD", "state": "awaiting_cutover", "error": "a word " * 300}]


@pytest.mark.parametrize("columns", [None, ""])
def test_what_is_listed_where_no_terminal_is_is_whole_and_a_line_for_each_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str | None
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    listed(LONG, "id", "state", "error")
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "01JD" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["01JD", "awaiting_cutover", ("a word " * 300).strip()]


def test_what_is_listed_is_as_wide_as_somebody_wants(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    listed(LONG, "id", "state", "error")
    assert {len(line) for line in capsys.readouterr().out.splitlines()} == {40}


def test_a_width_of_nothing_hides_nothing() -> None:
    assert run("migrate").exit_code == 0
    asked = [sys.executable, "-m", "forwardfill", "keys", "list"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "0"}).stdout
    assert "revoked" in told


def _commands(words: tuple[str, ...], found: Any) -> Iterator[tuple[str, ...]]:
    yield words
    for name, each in getattr(found, "commands", {}).items():
        yield from _commands((*words, name), each)


@pytest.mark.parametrize("words", list(_commands((), get_command(app))), ids=" ".join)
def test_help_is_cut_nowhere_on_a_terminal_of_eighty_columns(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = run(*words, "--help").stdout
    assert "Usage:" in told
    assert "…" not in told
    assert [line for line in told.splitlines() if re.search(r"[^ ]\.\.\.$", line) and "Usage:" not in line] == []


def test_whoever_lacks_a_key_is_told_where_to_put_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as world:
        monkeypatch.setenv("FORWARDFILL_URL", str(world.client.base_url))
        small = create_key(world.store.catalog, "small", "search")
        world.app.state.process.keyring.refresh()
        for key, why in (("", "unauthenticated (401)"), (small, "the key small has search")):
            monkeypatch.setenv("FORWARDFILL_API_KEY", key)
            refused = run("upgrade", "list")
            assert refused.exit_code == 1
            assert why in refused.stderr
            assert "; set FORWARDFILL_API_KEY to a key that may" in refused.stderr
            assert refused.stdout == ""


def test_who_stops_a_command_while_it_is_loaded_reads_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    search = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-m", "forwardfill", "--help"]
    stopped = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": search}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (130, "", "")
