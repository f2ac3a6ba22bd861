"""Several columns as one, one after the other. Nothing is copied but the rows that are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gallery.arrays import Rows, Stored


class Stack:
    """Columns of one model, one after the other; as immutable as they are."""

    def __init__(self, columns: Sequence[Stored]) -> None:
        """`columns` are one or more of (rows, dimension), all of the same dimension; their types may differ."""
        # An np.memmap costs microseconds for each slice, a plain view does not.
        self.columns = [np.asarray(column) for column in columns]
        self.starts = np.cumsum([0, *map(len, self.columns)])
        self.shape = (int(self.starts[-1]), self.columns[0].shape[1])
        self.dtype = np.result_type(*self.columns)

    def __len__(self) -> int:
        """How many rows all columns have."""
        return self.shape[0]

    def take(self, rows: Rows) -> Stored:
        """The rows (..., dimension) at positions (...) of the whole, in memory."""
        if len(self.columns) == 1:
            return self.columns[0][rows]
        flat = rows.reshape(-1)
        at = np.searchsorted(self.starts, flat, side="right") - 1
        order = np.argsort(at, kind="stable")
        ends = np.cumsum(np.bincount(at, minlength=len(self.columns))).tolist()
        taken, begin = np.empty((len(flat), self.shape[1]), self.dtype), 0
        for column, start, end in zip(self.columns, self.starts.tolist(), ends, strict=False):
            if end > begin:
                places = order[begin:end]
                taken[places] = column[flat[places] - start]
            begin = end
        return taken.reshape(*rows.shape, self.shape[1])
