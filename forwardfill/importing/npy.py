"""`.npy`: one array, mapped. Objects are never loaded: they are pickled, and unpickling runs what the file says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from forwardfill.importing.column import BadInput, Column, slices


def columns(path: Path) -> list[Column]:
    """The array: (n, d) numbers are vectors; (n,) integers or strings are values.

    Raises:
        BadInput: it is no such array.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise BadInput(
            f"{path}: not a plain array of numbers or strings ({error}); write it with numpy.save from such an array: "
            "pickled objects are refused, because to load them is to run them"
        ) from error
    if (rest := path.stat().st_size - array.offset - array.nbytes) > 0:  # its rows would be left out
        raise BadInput(f"{path}: {rest} bytes follow its array: save each array to its own file, or all of them as one")
    vectors = array.ndim == 2 and array.shape[1] > 0 and array.dtype.kind in "fiu"
    if not vectors and not (array.ndim == 1 and array.dtype.kind in "iuSU"):
        raise BadInput(
            f"{path}: an array of shape {array.shape} and type {array.dtype}; vectors are (n, d) real numbers, ids (n,) "
            "integers or strings"
        )
    return [Column(path, "", len(array), vectors, partial(slices, array))]
