"""What every format is read as: columns, each of which gives its rows in order, in blocks of Arrow arrays.

The columns of an import are read side by side, and may come from files of different formats. A format must only list its columns
and read one of them from a given row on; nothing else knows formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa


class BadInput(Exception):
    """A file or an option that cannot be imported; the message says what, where, and what would mend it."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a file."""

    path: Path
    #: empty where the file has no names for its columns
    name: str
    rows: int
    #: whether a row is a list of numbers; else it is a single value
    vectors: bool
    #: reads from a row on: Arrow arrays of any length, preferably that of the second argument
    read: Callable[[int, int], Iterator[Any]]

    @property
    def where(self) -> str:
        """The column's name in messages."""
        return f"{self.path}, column {self.name!r}" if self.name else str(self.path)

    def blocks(self, start: int, size: int) -> Iterator[Any]:
        """Arrow arrays of `size` rows from row `start` on; the last may be shorter.

        Raises:
            BadInput: the file is damaged, or no longer what it was when it was opened.
        """
        wrong = BadInput(
            f"{self.where}: said to have {self.rows} rows and has others; it is damaged, or changes meanwhile"
        )
        for block in self._legible(start, size):
            if len(block) != min(size, self.rows - start):
                raise wrong
            yield block
            start += len(block)
        if start != self.rows:
            raise wrong

    def _legible(self, start: int, size: int) -> Iterator[Any]:
        """What is read, as far as it can be."""
        try:
            for block in _rechunked(self.read(start, size), size):
                yield block
                start += len(block)
        except BadInput:
            raise
        except Exception as error:  # whatever the library of its format raises
            raise BadInput(f"{self.where}: cannot be read from row {start} on: {error}") from error


def as_arrow(block: np.ndarray[Any, Any]) -> Any:
    """An array (n, d) of real numbers as n lists of float32, or an array (n,) as n values."""
    if block.ndim == 1 and block.dtype.kind in "iu":
        return pa.array(np.ascontiguousarray(block, block.dtype.newbyteorder("=")))
    if block.ndim == 1:
        return pa.array(block.tolist())
    # A number beyond float32 becomes infinity, which is refused where vectors are checked.
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(block, np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), numbers.shape[1])


def slices(array: Any, start: int, size: int) -> Iterator[Any]:
    """Arrow arrays of `size` rows of something that gives NumPy arrays when it is sliced, from row `start` on."""
    return (as_arrow(array[at : at + size]) for at in range(start, len(array), size))


def skipping(arrays: Iterable[Any], rows: int) -> Iterator[Any]:
    """Leave out the first rows of a sequence of Arrow arrays."""
    for array in arrays:
        skipped = min(rows, len(array))
        rows -= skipped
        if skipped < len(array):
            yield array.slice(skipped)


def is_list_of_numbers(kind: Any) -> bool:
    """Whether an Arrow type can hold vectors."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))


def _rechunked(arrays: Iterable[Any], size: int) -> Iterator[Any]:
    waiting, rows = list[Any](), 0
    for array in arrays:
        array.validate(full=True)  # an offset that points elsewhere must be found before anyone follows it
        rest = array
        while rows + len(rest) >= size:
            yield _joined([*waiting, rest.slice(0, size - rows)])
            rest, waiting, rows = rest.slice(size - rows), [], 0
        if len(rest):
            waiting, rows = [*waiting, rest], rows + len(rest)
    if waiting:
        yield _joined(waiting)


def _joined(arrays: list[Any]) -> Any:
    """The arrays as one; a single one is not copied, because it may be mapped and larger than memory."""
    return arrays[0] if len(arrays) == 1 else pa.concat_arrays(arrays)
