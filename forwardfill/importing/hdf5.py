"""HDF5: its datasets of one or two dimensions, wherever they are in the file.

A dataset may lie in other files, which its file names: who wrote it could have any file of this machine sent as ids or
vectors. So only what lies in the file itself is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py

from forwardfill.importing.column import BadInput, Column, slices


def columns(path: Path) -> list[Column]:
    """The datasets, by their full names: (n, d) real numbers are vectors; (n,) integers or strings are values.

    Raises:
        BadInput: it is no HDF5 file.
    """
    found = list[Column]()

    def add(name: str, each: Any) -> None:
        if isinstance(each, h5py.Dataset) and (_is_matrix(each) or _is_list(each)):
            found.append(Column(path, name, len(each), _is_matrix(each), partial(_read, path, name)))

    try:
        with h5py.File(path, "r") as file:
            file.visititems(add)
    except OSError as error:
        raise BadInput(f"{path}: not an HDF5 file: {error}") from error
    return found


def _is_matrix(each: Any) -> bool:
    return each.ndim == 2 and each.shape[1] > 0 and each.dtype.kind in "fiu"


def _is_list(each: Any) -> bool:
    return each.ndim == 1 and (each.dtype.kind in "iu" or h5py.check_string_dtype(each.dtype) is not None)


def _read(path: Path, name: str, start: int, size: int) -> Iterator[Any]:
    with h5py.File(path, "r") as file:
        dataset = file[name]
        if dataset.external or dataset.is_virtual:
            raise BadInput(
                f"{path}, dataset {name!r}: it lies in other files, which may be anywhere; copy it into one file"
            )
        text = h5py.check_string_dtype(dataset.dtype) is not None
        yield from slices(dataset.asstr("utf-8") if text else dataset, start, size)
