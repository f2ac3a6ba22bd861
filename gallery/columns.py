"""A segment's vectors for one model: written once, memory-mapped by readers, verified by digest.

Ids are a column too: item ids never change within a segment, so a search turns rows into ids without a database.
"""

from __future__ import annotations

import errno
import hashlib
import resource
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from gallery import errors, faults
from gallery.arrays import Dtype, Rows, Stored
from gallery.files import Digested, Files, Written, digest


def open_many() -> None:
    """Let this process have as many files open as it may: what is mapped is one, and a segment is two or more.

    Of the 1,024 that most systems begin with, 500 segments take all, of one gallery or of many, and then none opens any more.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS says that there is no limit, and takes no such number
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def write(files: Files, folder: str, vectors: NDArray[Any], dtype: Dtype) -> Written:
    """Write (rows, dimension) vectors as one immutable `.npy` file.

    Raises:
        InvalidVector: a number is not finite as it is stored.
    """
    return _save(files, folder, np.ascontiguousarray(_stored(vectors, dtype)))


def write_blocks(
    files: Files, folder: str, blocks: Iterable[NDArray[Any]], *, rows: int, dimension: int, dtype: Dtype
) -> Written:
    """Write a column block by block, so that memory does not grow with the segment.

    Args:
        files: where.
        folder: under which folder.
        blocks: arrays of (some rows, dimension); together exactly `rows` rows.
        rows: rows of the column.
        dimension: width of the column.
        dtype: how it is stored.

    Raises:
        InvalidVector: a number is not finite as it is stored.
    """
    name, at = files.new(folder, ".npy"), 0
    with files.writing(name) as path, path.open("wb") as handle:
        file = Digested(handle)
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, dimension)}
        )
        for block in blocks:
            if block.ndim != 2 or block.shape[1] != dimension:
                raise errors.Damaged(f"a column of dimension {dimension} was given vectors of shape {block.shape}")
            file.write(np.ascontiguousarray(_stored(block, dtype, first=at)).data)
            at += len(block)
            faults.reached("write_column")
        if at != rows:
            raise errors.Damaged(f"a column of {rows} rows was given {at}")
    return file.as_written(name)


def with_stand_ins(blocks: Iterable[NDArray[Any]], unseen: Rows, dtype: Dtype) -> Iterator[NDArray[Any]]:
    """The blocks of a column, where those of the rows `unseen` (n,) that cannot be stored have a vector that can.

    Nobody sees the vector of a deleted item, but every metric must be able to compare it.
    """
    start = 0
    for block in blocks:
        own = unseen[(unseen >= start) & (unseen < start + len(block))] - start
        start += len(block)
        with np.errstate(over="ignore"):
            bad = own[~np.isfinite(block[own].astype(dtype)).all(axis=1)]
        if bad.size:
            changed = block.copy()
            changed[bad] = np.eye(1, block.shape[1])
            yield changed
        else:
            yield block


def read_blocks(files: Files, name: str, sha256: str, *, rows: int, dimension: int, size: int) -> Iterator[Stored]:
    """Read a column once from its start to its end, in runs of at most `size` rows, and compare its digest on the way.

    What is given is what was compared, whatever becomes of the file meanwhile. Whoever keeps something that was made of it must
    have taken all of it: only the end tells whether its bytes are right.

    Raises:
        Damaged: the file is gone, is not what the catalog describes, or its bytes changed.
    """
    path, sha = _present(files, name), hashlib.sha256()
    column = open_column(path, rows=rows, dimension=dimension)
    with path.open("rb") as handle:
        sha.update(handle.read(path.stat().st_size - column.nbytes))  # what stands before the numbers
        for start in range(0, rows, size):
            block = np.empty((min(size, rows - start), dimension), column.dtype)
            handle.readinto(block.data)
            sha.update(block.data)
            yield block
        sha.update(handle.read())
    _compare(name, sha.hexdigest(), sha256)


def open_column(path: Path, *, rows: int, dimension: int) -> Stored:
    """Map a column for reading.

    Raises:
        Damaged: the file is missing its rows, or is not the array that the catalog describes.
    """
    vectors = _mapped(path)
    if vectors.dtype.name not in get_args(Dtype) or not vectors.dtype.isnative:
        raise errors.Damaged(f"{path.name} holds {vectors.dtype.str}, which no column does")
    if vectors.shape != (rows, dimension):
        raise errors.Damaged(f"{path.name} has shape {vectors.shape}, the catalog says ({rows}, {dimension})")
    column: Stored = vectors
    return column


def _mapped(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        size = array.offset + array.nbytes  # type: ignore[attr-defined]  # it is mapped
    except OSError:
        raise
    except Exception as error:  # a header is parsed as Python's literals are, and fails in as many ways
        raise errors.Damaged(f"{path.name} is not a whole column: {error}") from error
    if path.stat().st_size != size:
        raise errors.Damaged(f"{path.name} has {path.stat().st_size} bytes, its header says {size}")
    return array


def blocks(column: NDArray[Any], size: int) -> Iterator[NDArray[Any]]:
    """The column in runs of at most `size` rows."""
    for start in range(0, len(column), size):
        yield column[start : start + size]


class Ids(Sequence[str]):
    """Item ids of a segment, by row, in one array: no Python string exists until someone asks for a row."""

    def __init__(self, packed: NDArray[np.uint8], rows: int) -> None:
        """Read `packed`, which is `rows + 1` little-endian int64 offsets, then the UTF-8 bytes of all ids."""
        head = 8 * (rows + 1)
        # Views of the same bytes: reading an item of them makes no array, which would cost more than the id itself.
        self._offsets = packed[:head].data.cast("q")
        self._text = packed[head:].data
        self._rows = rows

    def __len__(self) -> int:
        """Rows."""
        return self._rows

    def __getitem__(self, row: Any) -> Any:
        """The id of one row."""
        return str(self._text[self._offsets[row] : self._offsets[row + 1]], "utf-8")


def write_ids(files: Files, folder: str, ids: Sequence[str]) -> Written:
    """Write ids so that `open_ids` can map them."""
    encoded = [item.encode() for item in ids]
    offsets = np.zeros(len(ids) + 1, dtype="<i8")
    np.cumsum([len(item) for item in encoded], out=offsets[1:])
    text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    return _save(files, folder, np.concatenate([offsets.view(np.uint8), text]))


def open_ids(path: Path, rows: int) -> Ids:
    """Map the ids of a segment.

    Raises:
        Damaged: the file is not whole, or holds another number of ids.
    """
    packed = _mapped(path)
    head = 8 * (rows + 1)
    if packed.dtype != np.uint8 or packed.ndim != 1 or len(packed) < head:
        raise errors.Damaged(f"{path.name} is not a column of {rows} ids")
    if packed[head - 8 : head].view("<i8")[0] != len(packed) - head:
        raise errors.Damaged(f"{path.name} is a column of ids, but not of {rows}")
    return Ids(packed, rows)


def verify(files: Files, name: str, sha256: str) -> None:
    """Read a file again and compare its digest with the recorded one.

    Raises:
        Damaged: the bytes changed or cannot be read, or the file is gone.
    """
    try:
        found = digest(_present(files, name))
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise errors.Damaged(f"{name} cannot be read from its disk: {error}", file=name) from error
    _compare(name, found, sha256)


def _present(files: Files, name: str) -> Path:
    path = files.path(name)
    if not path.exists():
        raise errors.Damaged(f"{name} is recorded in the catalog but missing on disk", file=name)
    return path


def _compare(name: str, found: str, recorded: str) -> None:
    if found != recorded:
        raise errors.Damaged(f"{name} does not have its recorded SHA-256", file=name)


def _stored(vectors: NDArray[Any], dtype: Dtype, *, first: int = 0) -> Stored:
    """As they are stored. A transformation may give NaN, or more than float16 holds: such a row would never be found.

    The first vector is that of row `first`.
    """
    with np.errstate(over="ignore"):
        stored: Stored = vectors.astype(dtype, copy=False)
    if not (finite := np.isfinite(stored)).all():
        row = first + int(finite.all(axis=1).argmin())
        raise errors.InvalidVector(f"the vector of row {row} is NaN or infinite when stored as {dtype}", row=row)
    return stored


def _save(files: Files, folder: str, array: NDArray[Any]) -> Written:
    name = files.new(folder, ".npy")
    with files.writing(name) as path, path.open("wb") as handle:
        file = Digested(handle)
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)  # not by `np.save`, whose error for a full disk does not say what it is
        faults.reached("write_column")
    return file.as_written(name)
