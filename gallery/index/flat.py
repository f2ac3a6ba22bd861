"""Exact search on the mapped column itself: no file, no build, no second copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from gallery.arrays import Space, Stored, Vectors
from gallery.index import _exact, _parameters
from gallery.index.base import Found, Index, Joins
from gallery.index.quantizer import Assignments
from gallery.index.selection import Selected

JOINED_NUMBERS = 1 << 20  # 4 MiB of float32, copied in a millisecond


class FlatIndex:
    """Every row is compared with every query; the answer is exact and does not depend on the batch."""

    kind = "flat"

    def __init__(self, vectors: Stored, space: Space, *, prepared: bool = False) -> None:
        """`vectors` are (rows, dimension); `prepared` says that FAISS can read them as they are."""
        self._column = np.asarray(vectors)  # an np.memmap costs microseconds for each slice, a plain view does not
        self.space = space
        # Small columns are copied into one, so that a search makes one comparison and not many; large ones are read where
        # they lie.
        self.joins = Joins(self.kind, JOINED_NUMBERS // max(1, self._column.shape[1]))
        self._searched: Vectors | None = self._column if prepared or _exact.is_plain(self._column, space) else None
        self._preparing = Lock()
        self._longest: float | None = None

    @property
    def reads(self) -> int:
        """All numbers of the column."""
        return self._column.size

    def search(
        self,
        queries: Vectors,
        k: int,
        selected: Selected | None = None,
        assigned: Assignments | None = None,  # noqa: ARG002
    ) -> Found:
        """The `k` best rows for each query, as `base.Index.search` says."""
        _exact.check_request(queries, k, selected, self._column.shape)
        vectors = self._ready()
        longest = self._length(vectors) if len(queries) >= _exact.PRODUCT_QUERIES and len(vectors) else None
        return _exact.search(queries, vectors, k, self.space.metric, selected, longest)

    def join(self, others: Sequence[Index]) -> FlatIndex:
        """Exact search of one copy of all rows; the joined indexes then never need copies of their own."""
        columns = [_exact.prepared(each._column, each.space) for each in (self, *others) if isinstance(each, FlatIndex)]
        return FlatIndex(np.concatenate(columns), self.space, prepared=True)

    def prepare(self) -> None:
        """Nothing: a copy waits for the first search, see `_ready`."""

    def _ready(self) -> Vectors:
        """The column as FAISS can read it.

        A float16 column, or one whose lengths cosine must ignore, needs a float32 copy. It waits for the first search,
        because many segments of a snapshot are never searched, and it is small, because exact segments are.
        """
        if self._searched is None:
            with self._preparing:
                if self._searched is None:
                    self._searched = _exact.prepared(self._column, self.space)
        return self._searched

    def _length(self, vectors: Vectors) -> float:
        """The length of the longest row. Two threads may compute it at once; it is the same."""
        if self._longest is None:
            self._longest = _exact.length(vectors)
        return self._longest


class Flat:
    """Exact search; it has no parameters."""

    name = "flat"

    def build(self, vectors: Stored, *, space: Space, path: Path, parameters: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Nothing to write: the column is the index."""
        return False

    def open(self, vectors: Stored, *, space: Space, path: Path | None, parameters: Mapping[str, Any]) -> FlatIndex:  # noqa: ARG002
        """Search `vectors` where they lie."""
        return FlatIndex(vectors, space)

    def check(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """No parameters; any is refused with a ValueError."""
        return _parameters.checked(self.name, parameters, {})

    def efforts(self, rows: int, total: int | None = None) -> Sequence[Mapping[str, Any]]:  # noqa: ARG002
        """Nothing to steer: every row is compared."""
        return ()


BACKEND = Flat()
