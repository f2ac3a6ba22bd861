"""The documents say what is there: links, paths, settings, commands, states."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from tests.test_project import tracked_files

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT) for pattern in ("*.md", "docs/**/*.md") for path in ROOT.glob(pattern) if path.is_file()
)
RECORDS = sorted((ROOT / "docs" / "adr").glob("*.md"))
#: for the tests, and no settings of the service
TEST_VARIABLES = {"FORWARDFILL_REQUIRE_REAL", "FORWARDFILL_TEST_DATA", "FORWARDFILL_FAULT"}


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)


# --- links and paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_relative_link_resolves(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        if not re.match(r"[a-z]+:", link):
            target = link.partition("#")[0]
            assert (ROOT / document.parent / target).exists(), f"{document} links to {link}"


@pytest.mark.parametrize(
    "document",
    ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/operating.md", "docs/methods.md", "docs/vectors.md"],
)
def test_every_path_that_is_named_exists(document: str) -> None:
    # A service that was run here has left a folder of its own.
    folders = "|".join({file.parts[0] for file in tracked_files() if len(file.parts) > 1})
    text = (ROOT / document).read_text()
    # <placeholders> and {parameters} are no paths.
    for path in re.findall(rf"(?<![\w/.])((?:{folders})/[\w/.-]*\b/?)(?![\w/<{{-])", text):
        assert (ROOT / path.rstrip(".")).exists(), f"{document} names {path}"


def test_no_file_names_a_document_or_a_section_that_is_not_in_the_repository() -> None:
    elsewhere = {Path("LICENSE"), Path(__file__).relative_to(ROOT)}
    written_by_commands = {"results.md"}
    # A paper's section may be named with its year: "CVPR 2022, section 3.2".
    section = re.compile(r"(?i)(?<!\d{4}, )\b(?:sections?|design|methods) \d+\b")
    for file in set(tracked_files()) - elsewhere:
        text = (ROOT / file).read_text(errors="replace")
        for name in re.findall(r"[\w./-]*\w\.md\b", text):
            exists = (ROOT / name).exists() or (ROOT / file.parent / name).exists()
            assert exists or Path(name).name in written_by_commands, f"{file} names {name}"
        found = section.search(text)
        assert found is None, f"{file} names {found and found[0]}"
        for number in re.findall(r"\bADR (\d{4})\b", text):
            assert 1 <= int(number) <= len(RECORDS), f"{file} names ADR {number}"


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_a_record_gives_its_context_decision_and_consequences(record: Path) -> None:
    lines = record.read_text().splitlines()
    assert lines[0].startswith(f"# {record.name[:4]} ")
    assert any(line.startswith("Status: ") for line in lines)
    assert [line for line in lines if line.startswith("## ")] == ["## Context", "## Decision", "## Consequences"]


def test_records_are_numbered_without_gaps() -> None:
    assert [int(record.name[:4]) for record in RECORDS] == list(range(1, len(RECORDS) + 1))


# --- settings ---------------------------------------------------------------------------------------------------------


def settings() -> dict[str, object]:
    """Every variable that a process reads, with its default."""
    found: dict[str, object] = {}
    for file in sorted(ROOT.glob("*/settings.py")):
        module = importlib.import_module(f"{file.parent.name}.settings")
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, BaseSettings) and kind is not BaseSettings:
                prefix = kind.model_config.get("env_prefix", "")
                found |= {f"{prefix}{name}".upper(): each.default for name, each in kind.model_fields.items()}
    return found


@pytest.mark.parametrize("document", ["docker-compose.yml", "Dockerfile", "Makefile", *map(str, DOCUMENTS)])
def test_every_variable_that_is_named_is_a_setting(document: str) -> None:
    named = set(re.findall(r"\bFORWARDFILL_[A-Z0-9_]*[A-Z0-9]\b", (ROOT / document).read_text()))
    assert named <= settings().keys() | TEST_VARIABLES


def test_every_setting_is_documented_with_its_default() -> None:
    rows = re.findall(r"^\| `(FORWARDFILL_\w+)` \| (.*?) \|", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE)
    documented = dict(rows)
    assert documented.keys() == settings().keys()
    assert len(rows) == len(documented)
    for name, default in settings().items():
        if isinstance(default, int | float | Path) or (isinstance(default, str) and default):
            assert documented[name] == f"`{default}`", name


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(program: str) -> Iterator[tuple[str, list[str]]]:
    """Each call of a program in shell blocks and code spans of the documents, and in the files that start processes."""
    call = re.compile(rf"(?:^|[\s;&|(/]){program}( [^#;&|)`\n]*)?(?=$|[#;&|)`\n])", re.MULTILINE)
    for document in DOCUMENTS:
        text = (ROOT / document).read_text().replace("\\\n", "")  # a command that goes on in the next line
        code = [*code_blocks(text, "bash"), *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]
        for each in code:
            for arguments in call.findall(each):
                yield str(document), shlex.split(arguments)
    for name in ("docker-compose.yml", "Dockerfile"):
        for listed in re.findall(rf'\["{program}"((?:, "[^"]*")*)\]', (ROOT / name).read_text()):
            yield name, re.findall(r'"([^"]*)"', listed)
    for line in re.findall(rf"/{program}( .*)?$", (ROOT / "Makefile").read_text(), re.MULTILINE):
        yield "Makefile", shlex.split(line.replace("$(ARGS)", ""))


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [(where, words[0]) for where, words in commands("make") if words and "=" not in words[0]]
    assert named
    for where, target in named:
        assert target in targets, f"{where} says: make {target}"


def test_every_command_that_is_named_exists_with_its_options() -> None:
    from typer.core import TyperGroup
    from typer.main import get_command

    from forwardfill.cli import app

    named = list(commands("forwardfill"))
    assert {"serve", "worker", "keys", "migrate", "demo"} <= {words[0] for _, words in named if words}
    for where, words in named:
        command = get_command(app)
        for at, word in enumerate(words):
            if isinstance(command, TyperGroup) and not word.startswith("-"):
                assert word in command.commands, f"{where} says: forwardfill {' '.join(words[: at + 1])}"
                command = command.commands[word]
            elif word.startswith("--") and word != "--help":
                options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
                assert word.partition("=")[0] in options, f"{where} says: forwardfill {' '.join(words)}"


def test_drafts_of_migrations_that_were_thrown_away_are_in_the_way_of_no_other(tmp_path: Path) -> None:
    blocks = code_blocks((ROOT / "CONTRIBUTING.md").read_text(), "bash")
    (command,) = (each for each in blocks if "schema.revise" in each)
    command = textwrap.dedent(command).replace(".venv/bin/python", shlex.quote(sys.executable))
    for name in ("gallery", "migrations"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    versions = tmp_path / "migrations" / "versions"
    there = set(versions.glob("*.py"))

    def draft() -> set[Path]:
        subprocess.run(["bash", "-euc", command], cwd=tmp_path, check=True, capture_output=True)
        return set(versions.glob("*.py")) - there

    draft()
    two = draft()  # the second knows the first
    assert len(two) == 2
    for each in two:
        each.unlink()
    assert len(draft()) == 1


# --- states -----------------------------------------------------------------------------------------------------------


def test_the_diagram_shows_the_steps_that_the_code_allows() -> None:
    from gallery.upgrade import states

    (diagram,) = code_blocks((ROOT / "ARCHITECTURE.md").read_text(), "mermaid")
    drawn = {(now, then) for now, then in re.findall(r"^ +(\w+) --> (\w+)", diagram, re.MULTILINE)}
    assert drawn == {(str(now), str(then)) for now, after in states.NEXT.items() for then in after}
