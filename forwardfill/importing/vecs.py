"""`.fvecs` and `.bvecs`: each row is its dimension as an int32, then its numbers as float32 or uint8; mapped."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from forwardfill.importing.column import BadInput, Column, as_arrow


def columns(path: Path, number: str) -> list[Column]:
    """The vectors, of numbers of one type.

    Raises:
        BadInput: the file is not whole rows of the dimension that the first one has.
    """
    with path.open("rb") as file:
        dimension = int.from_bytes(file.read(4), "little", signed=True)
    if dimension <= 0 or path.stat().st_size % (4 + dimension * np.dtype(number).itemsize):
        raise BadInput(
            f"{path}: begins with the dimension {dimension}, and its size of {path.stat().st_size} bytes is not that of whole "
            "rows of it; it is cut off, or of another format"
        )
    rows = np.memmap(path, np.dtype([("dimension", "<i4"), ("vector", number, (dimension,))]), mode="r")
    return [Column(path, "", len(rows), True, partial(_read, path, rows))]


def _read(path: Path, rows: Any, start: int, size: int) -> Iterator[Any]:
    dimension = rows.dtype["vector"].shape[0]
    for at in range(start, len(rows), size):
        block = rows[at : at + size]
        other = np.flatnonzero(block["dimension"] != dimension)
        if len(other):
            raise BadInput(
                f"{path}, row {at + other[0]}: its dimension is {block['dimension'][other[0]]}, that of the rows before it is "
                f"{dimension}; a file must have one"
            )
        yield as_arrow(block["vector"])
