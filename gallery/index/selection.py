"""Which rows may be found, with what is asked of them again and again."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from gallery.arrays import Mask, Rows
from gallery.index._library import faiss


class Selected:
    """The rows of a shelf, or of a segment, that may be found; immutable, so what is found out about them once holds."""

    def __init__(self, mask: Mask) -> None:
        """`mask` is (rows,) bool, and stays as it is."""
        self.mask = mask

    @cached_property
    def count(self) -> int:
        """How many rows are selected."""
        return int(np.count_nonzero(self.mask))

    @cached_property
    def rows(self) -> Rows:
        """(count,) int64, ascending."""
        return np.flatnonzero(self.mask)

    @cached_property
    def selector(self) -> Any:
        """The mask as FAISS wants it. It only points at the bits, so it keeps them: two threads may make one each."""
        bits = np.packbits(self.mask, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
        faiss.add_to_referenced_objects(selector, bits)
        return selector
