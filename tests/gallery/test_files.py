"""Files appear whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from gallery import errors
from gallery.files import PART, Files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """An empty folder."""
    return Files(tmp_path / "data")


def sweep(files: Files, folder: str, *, known: Callable[[str], bool], older_than: float) -> list[str]:
    return files.remove_unknown(files.old(folder, older_than=older_than), known=known, older_than=older_than)


def put(files: Files, name: str, *, age: float = 0) -> None:
    """A file that was last touched `age` seconds ago."""
    path = files.path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    os.utime(path, (time.time() - age,) * 2)


def test_a_file_has_its_name_only_when_it_is_whole(files: Files) -> None:
    with files.writing("a/b.npy") as part:
        part.write_bytes(b"whole")
        assert part.name == "b.npy" + PART
        assert not files.path("a/b.npy").exists()
    assert files.path("a/b.npy").read_bytes() == b"whole"
    assert not part.exists()


def test_a_write_that_fails_leaves_nothing_and_keeps_what_was_there(files: Files) -> None:
    put(files, "a")
    with suppress(ZeroDivisionError), files.writing("a") as part:
        part.write_bytes(b"half")
        raise ZeroDivisionError
    assert [path.name for path in files.root.iterdir()] == ["a"]
    assert files.path("a").read_bytes() == b"x"


def test_a_full_disk_is_said_with_the_name_of_what_did_not_fit(files: Files) -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: 'columns/a\.npy'"),
        files.writing("columns/a.npy"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"a")


def test_a_write_that_writes_nothing_is_an_error(files: Files) -> None:
    with pytest.raises(FileNotFoundError), files.writing("a"):
        pass
    assert list(files.root.iterdir()) == []


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../out", "link/out"])
def test_a_name_that_leads_out_of_the_folder_is_refused(files: Files, name: str, tmp_path: Path) -> None:
    (files.root / "link").symlink_to(tmp_path)
    with pytest.raises(errors.Damaged, match="leads out of the data folder"):
        files.path(name)
    with pytest.raises(errors.Damaged):
        files.remove([name])


def test_new_names_are_never_the_same(files: Files) -> None:
    assert len({files.new("c", ".npy") for _ in range(1000)}) == 1000


def test_removing_what_is_gone_is_no_error(files: Files) -> None:
    put(files, "a")
    files.remove(["a", "a", "never"])
    assert list(files.root.iterdir()) == []


def test_what_was_mapped_stays_readable_after_it_is_removed(files: Files) -> None:
    put(files, "a")
    with files.path("a").open("rb") as reader:
        files.remove(["a"])
        assert reader.read() == b"x"


def test_the_sweep_takes_what_is_old_and_unknown_and_nothing_else(files: Files) -> None:
    for name in ("c/known", "c/1/unknown", "c/torn.npy" + PART, "other/unknown"):
        put(files, name, age=100)
    put(files, "c/young")
    assert sweep(files, "c", known={"c/known"}.__contains__, older_than=50) == ["c/1/unknown", "c/torn.npy" + PART]
    left = {path.relative_to(files.root).as_posix() for path in files.root.rglob("*") if path.is_file()}
    assert left == {"c/known", "c/young", "other/unknown"}


def test_what_is_about_to_be_named_is_young_again_or_is_not_named(files: Files) -> None:
    put(files, "c/slow", age=7200)
    with files.unnamed(["c/slow"]):
        pass
    assert sweep(files, "c", known=lambda _: False, older_than=3600) == []
    put(files, "c/slower", age=7200)
    with pytest.raises(errors.Damaged, match="c/slower waited so long"), files.unnamed(["c/slow", "c/slower"]):
        assert sweep(files, "c", known=lambda _: False, older_than=3600) == ["c/slower"]
    assert not files.path("c/slow").exists()


def test_the_sweep_of_a_folder_that_is_not_there_finds_nothing(files: Files) -> None:
    assert sweep(files, "never", known=lambda _: False, older_than=0) == []
