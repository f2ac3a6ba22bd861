"""What the approximate FAISS indexes share: reading a column block by block, mapping, and searching."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gallery.arrays import Mask, Rows, Space, Stored, Vectors
from gallery.index import _exact
from gallery.index._filtering import How, how, pool
from gallery.index._library import faiss
from gallery.index.base import Found
from gallery.index.quantizer import Assignments


class FaissIndex(ABC):
    """A FAISS index that proposes rows, which are then scored exactly from the column.

    The FAISS object is never changed after opening: everything that steers a search is passed with the search, so any
    number of threads may search at once.
    """

    #: whether `_select` can be asked
    by_lists: ClassVar[bool] = False
    #: how many rows are scored exactly for each that is wanted; more than 1 where the index knows the vectors roughly
    rerank = 1

    def __init__(self, kind: str, index: Any, *, vectors: Stored, space: Space) -> None:
        self.kind = kind
        self._index = index
        self._column = np.asarray(vectors)
        self._space = space

    def search(
        self, queries: Vectors, k: int, selected: Mask | None = None, assigned: Assignments | None = None
    ) -> Found:
        """The `k` best rows for each query, as `base.Index.search` says."""
        _exact.check_request(queries, k, selected, self._column.shape)
        total = len(self._column)
        count = total if selected is None else int(np.count_nonzero(selected))
        if not count or not len(queries):
            return _exact.nothing(len(queries), k, self._space.metric)
        if assigned is None or assigned.queries is not queries:
            assigned = Assignments(queries)
        if selected is None or count == total:
            return self._sieve(assigned, k, None, 1.0)
        way = how(total, count, k, by_lists=self.by_lists)
        if way is How.EXACT:
            return _exact.search_column(queries, self._column, k, self._space, selected)
        if way is How.LISTS:
            return self._select(assigned, k, selected)
        return self._sieve(assigned, k, selected, total / count)

    @abstractmethod
    def _propose(self, assigned: Assignments, count: int, effort: float) -> Rows:
        """`count` rows (queries, count) that FAISS finds best, or `rerank` times as many; -1 where it finds fewer.

        `effort` is how much harder to look than a search of all rows does, at least 1.
        """

    def _select(self, assigned: Assignments, k: int, selected: Mask) -> Found:
        """The `k` best of the selected rows, read from lists."""
        raise NotImplementedError

    def _sieve(self, assigned: Assignments, k: int, selected: Mask | None, effort: float) -> Found:
        """Let FAISS propose rows, and answer exactly the queries for which it proposed too few.

        The selection is applied to what FAISS proposes and not handed to it. Its own filter stops when the
        neighbourhood of the query is searched, whether or not selected rows were there: with 2,500 selected of 6,000,
        all far from the query, it found 10 rows and none of the 10 best. Here too few of them are seen to be too few.
        """
        total = len(self._column)
        wanted = min(k, total)
        rows = self._propose(assigned, wanted if selected is None else min(pool(k, effort), total), effort)
        if selected is not None:
            rows = np.where(selected[rows], rows, -1)  # -1 picks the last row's mark, and stays -1 either way
            first = np.argsort(rows < 0, axis=1, kind="stable")[:, : k * self.rerank]
            rows = np.take_along_axis(rows, first, axis=1)
        found = _exact.ranked(assigned.queries, rows, self._column, self._space, k)
        last = found.rows[:, wanted - 1]
        if last.min() < 0:
            short = np.flatnonzero(last < 0)
            allowed = np.ones(total, np.bool_) if selected is None else selected
            exact = _exact.search_column(assigned.queries[short], self._column, k, self._space, allowed)
            found.scores[short], found.rows[short] = exact
        return found


def mapped(kind: str, path: Path | None, flags: int, vectors: Stored) -> Any:
    """The FAISS index at `path`, mapped, to be searched beside the column it was built from.

    Raises:
        ValueError: there is no file, or it is not an index of a column of this shape.
    """
    if path is None:
        raise ValueError(f"{kind} needs its index file to open, and got none")
    index = faiss.read_index(str(path), flags)
    if (index.ntotal, index.d) != vectors.shape:
        raise ValueError(f"{path} indexes {index.ntotal} x {index.d} vectors, and the column has {vectors.shape}")
    return index


def blocks(vectors: Stored, space: Space) -> Iterator[Vectors]:
    """The column in float32 pieces as FAISS is to index them, so that building needs no copy of all of it."""
    for start in range(0, len(vectors), _exact.BLOCK):
        yield _exact.prepared(vectors[start : start + _exact.BLOCK], space)
