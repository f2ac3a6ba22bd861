"""Columns and ids: what was written is read, and what is not whole is refused."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EFBIG, EIO, EMFILE
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gallery import columns, errors
from gallery.files import Files, digest

IDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=30)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """An empty folder."""
    return Files(tmp_path / "data")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_column_is_read_as_it_was_written(files: Files, dtype: Any) -> None:
    vectors = np.random.default_rng(0).standard_normal((100, 7))
    whole = columns.write(files, "c", vectors, dtype)
    blocks = columns.write_blocks(files, "c", columns.blocks(vectors, 33), rows=100, dimension=7, dtype=dtype)
    for one in (whole, blocks):
        read = columns.open_column(files.path(one.name), rows=100, dimension=7)
        assert read.dtype == dtype
        assert np.array_equal(read, vectors.astype(dtype))
        assert not read.flags.writeable
        assert (one.sha256, one.bytes) == (digest(files.path(one.name)), files.path(one.name).stat().st_size)
    assert whole.sha256 == blocks.sha256
    assert whole.name != blocks.name


@pytest.mark.parametrize("given_rows", [99, 0])
def test_a_column_that_is_given_too_few_rows_leaves_nothing(files: Files, given_rows: int) -> None:
    with pytest.raises(errors.Damaged, match=f"a column of 100 rows was given {given_rows}"):
        columns.write_blocks(files, "c", [np.zeros((given_rows, 2))], rows=100, dimension=2, dtype="float32")
    assert [path for path in files.root.rglob("*") if path.is_file()] == []


def test_a_column_that_is_cut_off_anywhere_is_damaged(files: Files) -> None:
    path = files.path(columns.write(files, "c", np.ones((3, 2)), "float32").name)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(errors.Damaged):
            columns.open_column(path, rows=3, dimension=2)
        with pytest.raises(errors.Damaged):
            columns.open_ids(path, 3)


def test_a_header_of_which_any_bit_changed_is_damaged_or_says_the_same(files: Files) -> None:
    opened = (
        (
            columns.write(files, "c", np.ones((3, 2)), "float32"),
            lambda path: columns.open_column(path, rows=3, dimension=2),
        ),
        (columns.write_ids(files, "c", ["a", "b"]), lambda path: columns.open_ids(path, 2)),
    )
    for written, opens in opened:
        path = files.path(written.name)
        content, whole = path.read_bytes(), list(map(as_bytes, opens(path)))
        for bit in range(8 * 128):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            try:
                read = opens(path)
            except errors.Damaged:
                continue
            assert list(map(as_bytes, read)) == whole


def as_bytes(row: Any) -> bytes:
    """The numbers of a row of a column, or the text of an id."""
    return row.encode() if isinstance(row, str) else row.astype("float64").tobytes()


def test_a_file_that_its_disk_cannot_read_is_damaged(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    made = columns.write(files, "c", np.ones((3, 2)), "float32")
    for code, raised in ((EIO, errors.Damaged), (EMFILE, OSError)):

        def failing(_: Path, code: int = code) -> str:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(columns, "digest", failing)
        with pytest.raises(raised, match=os.strerror(code)):
            columns.verify(files, made.name, made.sha256)


def test_a_write_that_finds_no_room_says_by_its_number_why(files: Files) -> None:
    """As of a full disk; here it is the most bytes that a file may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        for write in (
            lambda: columns.write(files, "c", np.ones((10_000, 2)), "float32"),
            lambda: columns.write_ids(files, "c", ["a" * 500] * 500),
        ):
            with pytest.raises(OSError, match="too large") as raised:
                write()
            assert raised.value.errno == EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in files.root.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("rows", "dimension"), [(4, 2), (3, 3), (2, 3)])
def test_a_column_of_another_shape_than_recorded_is_damaged(files: Files, rows: int, dimension: int) -> None:
    path = files.path(columns.write(files, "c", np.ones((3, 2)), "float32").name)
    with pytest.raises(errors.Damaged, match="has shape"):
        columns.open_column(path, rows=rows, dimension=dimension)


def test_a_column_that_holds_a_pickle_is_refused_and_not_run(files: Files) -> None:
    path = files.path("evil.npy")
    np.save(path, np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(errors.Damaged):
        columns.open_column(path, rows=1, dimension=1)


def test_a_changed_byte_is_found_by_the_digest_wherever_it_is(files: Files) -> None:
    written = columns.write(files, "c", np.ones((3, 2)), "float32")
    path = files.path(written.name)
    columns.verify(files, written.name, written.sha256)
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(errors.Damaged, match="does not have its recorded SHA-256"):
            columns.verify(files, written.name, written.sha256)
    path.unlink()
    with pytest.raises(errors.Damaged, match="missing on disk"):
        columns.verify(files, written.name, written.sha256)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", [1, 33, 100, 1000])
def test_a_column_that_is_read_in_blocks_is_what_was_written(files: Files, dtype: Any, size: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((100, 7))
    written = columns.write(files, "c", vectors, dtype)
    blocks = list(columns.read_blocks(files, written.name, written.sha256, rows=100, dimension=7, size=size))
    assert [len(block) for block in blocks] == [len(block) for block in columns.blocks(vectors, size)]
    read = np.concatenate(blocks)
    assert read.dtype == dtype
    assert np.array_equal(read, vectors.astype(dtype))


def test_a_changed_byte_is_found_by_who_reads_to_the_end_wherever_it_is(files: Files) -> None:
    written = columns.write(files, "c", np.ones((3, 2)), "float32")
    path = files.path(written.name)

    def read() -> int:
        blocks = columns.read_blocks(files, written.name, written.sha256, rows=3, dimension=2, size=2)
        return sum(len(block) for block in blocks)

    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(errors.Damaged):
            read()
    for other in (content + b"x", content[:-1]):
        path.write_bytes(other)
        with pytest.raises(errors.Damaged):
            read()
    path.write_bytes(content)
    assert read() == 3
    path.unlink()
    with pytest.raises(errors.Damaged, match="missing on disk"):
        read()


def test_the_digest_of_a_column_is_that_of_what_was_written_and_not_of_what_the_disk_made_of_it(files: Files) -> None:
    class Failing(Files):
        """A disk that turns a bit before the file has its name."""

        @contextmanager
        def writing(self, name: str) -> Iterator[Path]:
            with super().writing(name) as path:
                yield path
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(content)

    failing = Failing(files.root)
    written = columns.write_blocks(failing, "c", [np.ones((3, 2))], rows=3, dimension=2, dtype="float32")
    with pytest.raises(errors.Damaged, match="does not have its recorded SHA-256"):
        columns.verify(files, written.name, written.sha256)


def test_a_column_is_given_no_vectors_of_another_width(files: Files) -> None:
    with pytest.raises(errors.Damaged, match=r"dimension 2 was given vectors of shape \(3, 4\)"):
        columns.write_blocks(files, "c", [np.zeros((3, 4))], rows=6, dimension=2, dtype="float32")
    assert [path for path in files.root.rglob("*") if path.is_file()] == []


@given(ids=IDS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_are_read_as_they_were_written(files: Files, ids: list[str]) -> None:
    written = columns.write_ids(files, "c", ids)
    read = columns.open_ids(files.path(written.name), len(ids))
    assert len(read) == len(ids)
    assert list(read) == ids
    assert [read[row] for row in np.arange(len(ids))] == ids


def test_ids_of_fewer_rows_than_recorded_are_damaged(files: Files) -> None:
    path = files.path(columns.write_ids(files, "c", ["a", "b"]).name)
    for rows in (1, 3, 100):
        with pytest.raises(errors.Damaged):
            columns.open_ids(path, rows)
