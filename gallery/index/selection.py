"""Which rows may be found, in the three forms that searches need."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from gallery.arrays import Mask, Rows
from gallery.index._library import faiss


class Selected:
    """The rows of a shelf or segment that may be found; immutable, so each form is made once, when it is first needed."""

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
        """The mask as FAISS wants it: it points at bits, which are kept with it. Two threads may each make one."""
        bits = np.packbits(self.mask, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
        faiss.add_to_referenced_objects(selector, bits)
        return selector
