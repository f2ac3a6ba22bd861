"""What an operator can mend ends a command in a line that names it, without secrets; what nobody expects is no refusal."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import ProgrammingError
from typer.testing import CliRunner

from forwardfill.cli import app
from forwardfill.refusals import in_words

AWAY = "postgresql+psycopg://user:geheim@127.0.0.1:1/catalog"


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDFILL_DATA", str(tmp_path / "data"))
    # A worker would tell this process's libraries otherwise.
    for name in ("OMP_NUM_THREADS", "MKL_DISABLE_FAST_MM", "MALLOC_ARENA_MAX"):
        monkeypatch.setenv(name, "1")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("command", "variable", "value", "told"),
    [
        ("serve", "PORT", "abc", "FORWARDFILL_PORT: Input should be a valid integer"),
        (
            "serve --no-worker",
            "HOST",
            "0.0.0.0",
            "FORWARDFILL_HOST: '0.0.0.0' is not a loopback address and no key was made",
        ),
        ("gc", "MAX_K", "abc", "FORWARDFILL_MAX_K: Input should be a valid integer"),
        ("migrate", "DATABASE_URL", "geheim", "FORWARDFILL_DATABASE_URL: is not of the form sqlite:////"),
        ("migrate", "DATABASE_URL", "mysql://u:geheim@x", "or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"),
        ("migrate", "DATABASE_URL", "postgresql://u:p@x:geheim/y", "FORWARDFILL_DATABASE_URL: is not of the form"),
        ("migrate", "DATABASE_URL", AWAY, "the catalog does not answer"),
        ("migrate", "DATABASE_URL", f"{AWAY}?no=geheim", 'invalid connection option "no"'),
        ("migrate", "DATABASE_URL", "sqlite:////proc/nope/catalog", "unable to open database file"),
        (
            "keys create --name x",
            "DATABASE_URL",
            "postgres://u:geheim@x/y",
            "FORWARDFILL_DATABASE_URL: is not of the form",
        ),
        ("keys list", "DATABASE_URL", "sqlite:///:memory:", "FORWARDFILL_DATABASE_URL: names no file"),
        ("keys list", "DATABASE_URL", AWAY, 'server at "127.0.0.1", port 1 failed'),
        ("migrate", "DATA", "/proc/nope", "FORWARDFILL_DATA: the folder /proc/nope cannot be made"),
        ("worker", "BROKER_URL", "foo://:geheim@x", "FORWARDFILL_BROKER_URL: is not the URL of a broker"),
        ("worker", "BROKER_URL", "redis://:geheim@x?foo=1", "FORWARDFILL_BROKER_URL: is not the URL of a broker"),
        ("serve", "BROKER_URL", "rediss://:geheim@x?ssl_cert_reqs=yes", "rediss://:PASSWORD@HOST:6379/0?ssl_ca_certs"),
        ("worker", "DEVICE", "foo", "FORWARDFILL_DEVICE: is not auto, cpu, cuda, or cuda:N (got 'foo')"),
        ("serve", "DEVICE", "foo", "FORWARDFILL_DEVICE: is not auto, cpu, cuda, or cuda:N (got 'foo')"),
        ("worker", "DEVICE", "cuda:99", "cannot compute on 'cuda:99'"),
        ("models list", "URL", "geheim", "FORWARDFILL_URL: is not of the form http://"),
        ("models list", "API_KEY", "geheim geheim", "FORWARDFILL_API_KEY: has spaces"),
    ],
)
def test_it_ends_in_one_line_that_names_it_and_tells_no_secret(
    command: str, variable: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FORWARDFILL_{variable}", value)
    ended = run(*command.split())
    assert ended.exit_code == 2, ended.exception
    assert told in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "geheim" not in ended.output


@pytest.mark.parametrize(
    "command",
    [
        *("serve --no-worker --data", "migrate --data", "verify --data", "gc --data", "keys list --data"),
        "import photos --model old --vectors photos.faiss --allow-folder",
    ],
)
def test_a_folder_that_is_nothing_is_not_taken_for_the_present_one(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run(*command.split(), "")
    assert ended.exit_code == 2, ended.exception
    option = command.rpartition(" ")[2]
    told = f"Invalid value for '{option}': it is empty; name a folder, or leave the option out"
    assert told in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["keys list", "keys revoke one"])
def test_keys_are_looked_for_where_a_catalog_is_and_none_is_made_for_it(command: str, tmp_path: Path) -> None:
    ended = run(*command.split())
    assert ended.exit_code == 2, ended.exception
    assert "FORWARDFILL_DATA" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_is_not_there_is_not_revoked() -> None:
    assert run("migrate").exit_code == 0
    ended = run("keys", "revoke", "nobody")
    assert (ended.exit_code, ended.stderr) == (2, "no key is named 'nobody'\n")


def test_several_processes_are_not_started_where_the_database_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDFILL_PROCESSES", "2")
    monkeypatch.setenv("FORWARDFILL_DATABASE_URL", AWAY)
    ended = run("serve")
    assert ended.exit_code == 2, ended.exception
    assert "the catalog does not answer" in ended.stderr


@pytest.mark.parametrize("command", ["serve --no-worker", "migrate", "verify", "verify --repair", "gc", "keys list"])
def test_a_catalog_of_a_newer_version_is_refused_in_a_line_that_says_what_helps(command: str, tmp_path: Path) -> None:
    assert run("migrate").exit_code == 0
    with sqlite3.connect(tmp_path / "data" / "catalog.sqlite3") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '20991231'")
    connection.close()
    ended = run(*command.split())
    assert ended.exit_code == 2, ended.exception
    assert "made by a newer version" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command", ["serve --no-worker", "serve --no-worker --processes 2", "worker", "verify --repair", "gc --delete"]
)
def test_who_would_write_into_the_folder_of_another_catalog_is_refused_in_a_line(command: str, tmp_path: Path) -> None:
    assert run("migrate").exit_code == 0
    (tmp_path / "data" / "catalog.id").write_text("01M8NKHKZ5R6NS45QWCW26YAYP\n")
    ended = run(*command.split())
    assert ended.exit_code == 2, ended.exception
    assert f"{tmp_path / 'data'} belongs to another catalog" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_each_wrong_setting_has_a_line_with_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDFILL_MAX_K", "0")
    monkeypatch.setenv("FORWARDFILL_THREADS", "-1")
    assert run("migrate").stderr.splitlines() == [
        "FORWARDFILL_MAX_K: Input should be greater than or equal to 1 (got '0')",
        "FORWARDFILL_THREADS: Input should be greater than or equal to 0 (got '-1')",
    ]


def test_a_service_that_is_away_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDFILL_URL", "http://user:geheim@127.0.0.1:1")
    ended = run("models", "list")
    assert ended.exit_code == 1
    assert "no service answers at http://127.0.0.1:1: " in ended.stderr
    assert "geheim" not in ended.output


@pytest.mark.parametrize("proxy", ["socks://user:geheim@proxy:1080", "http://user:ge/geheim@proxy:1080"])
def test_a_proxy_that_cannot_be_used_is_one_line_too(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("FORWARDFILL_URL", "http://elsewhere.invalid")
    refused = CliRunner().invoke(app, ["models", "list"])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "ALL_PROXY" in refused.stderr
    assert "geheim" not in refused.stderr


def test_a_driver_that_is_not_installed_is_named_with_its_extra() -> None:
    missing = ModuleNotFoundError("No module named 'psycopg'", name="psycopg")
    assert in_words(missing) == "psycopg is not installed: pip install 'forwardfill[postgres]'"


def test_a_fault_of_ours_is_no_refusal() -> None:
    class Ours(BaseModel):
        number: int

    with pytest.raises(ValidationError) as raised:
        Ours.model_validate({"number": "x"})
    statement = ProgrammingError("SELECT nothing", {}, Exception("no such column"))
    ours = (ValueError("x"), KeyError("x"), ModuleNotFoundError("x", name="gallery.x"), statement, raised.value)
    assert [in_words(each) for each in ours] == [None] * len(ours)
    assert in_words(BrokenPipeError()) is None, "whoever read the output wants no more"


@pytest.mark.parametrize("command", ["worker", "verify", "gc", "keys list"])
def test_a_file_that_is_no_catalog_is_one_line_too(command: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "catalog.sqlite3").write_bytes(b"something else " * 1000)
    ended = run(*command.split())
    assert ended.exit_code == 2, ended.exception
    assert "file is not a database" in ended.stderr
    assert ended.stderr.count("\n") == 1
