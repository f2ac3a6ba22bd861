"""A run of the benchmarks as a whole: what becomes of a group that fails, and what the documents say of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.__main__ import GROUPS, run
from benchmarks.setting import Setting
from benchmarks.table import Line, Pair, compared, exit_code

DOCUMENT = Path(__file__).parents[2] / "docs/benchmarks.md"


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(scratch=tmp_path, root=None, items=100, million=1000, rounds=1, quick=True)


def test_a_group_that_fails_midway_fails_the_run_and_keeps_what_it_measured(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(_: Setting) -> Iterator[Line]:
        yield compared("first", [Pair(1, 1)])
        raise OSError("the disk is full")

    group = run("torn", measure, setting)
    assert [line.what for line in group.lines] == ["first"]
    assert group.failed == "OSError: the disk is full"
    assert exit_code([group]) == 1
    assert "the disk is full" in capsys.readouterr().err  # with its traceback, for whoever has to mend it


def test_a_group_without_its_data_is_skipped_with_its_reason(setting: Setting) -> None:
    group = run("reembed", GROUPS["reembed"], setting)
    assert group.skipped is not None
    assert "cifar100/" in group.skipped
    assert exit_code([group]) == 0


def test_a_group_leaves_nothing_on_the_disk_even_if_it_fails(setting: Setting) -> None:
    def measure(of: Setting) -> Iterator[Line]:
        with of.folder() as folder:
            (folder / "column").write_bytes(b"x")
            raise OSError
        yield

    run("torn", measure, setting)
    assert list(setting.scratch.iterdir()) == []


@pytest.mark.parametrize("name", GROUPS)
def test_each_group_is_explained_with_its_bars(name: str) -> None:
    assert f"\n| `{name}` | " in DOCUMENT.read_text(encoding="utf-8")
