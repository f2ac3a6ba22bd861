"""What the approximate FAISS indexes share: reading a column block by block, opening, and searching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gallery.index import _exact
from gallery.index._library import faiss
from gallery.index.base import Found, Mask, Space, Stored, Vectors

# Below this many selected rows exact search is both faster and right: an index that may show only a few of its rows
# spends its effort on those it must not show.
EXACT_SELECTION = 2048

# How one search is steered: FAISS's parameters, from the selector (or None) and the effort factor, at least 1.
Steer = Callable[[Any, float], Any]


class FaissIndex:
    """A FAISS index that proposes rows, which are then scored exactly from the column.

    The FAISS object is never changed after opening: everything that steers a search is passed with the search, so any
    number of threads may search at once.
    """

    def __init__(self, kind: str, index: Any, *, vectors: Stored, space: Space, steer: Steer) -> None:
        self.kind = kind
        self._index = index
        self._column = np.asarray(vectors)
        self._space = space
        self._steer = steer

    def search(self, queries: Vectors, k: int, selected: Mask | None = None) -> Found:
        """The `k` best rows for each query, as `base.Index.search` says."""
        _exact.check_request(queries, k, selected, self._column.shape)
        total = len(self._column)
        count = total if selected is None else int(np.count_nonzero(selected))
        if not count or not len(queries):
            return _exact.nothing(len(queries), k, self._space.metric)
        if selected is None or count == total:
            return self._propose(queries, k, None, total)
        if count <= max(EXACT_SELECTION, 4 * k):
            return _exact.search_column(queries, self._column, k, self._space, selected)
        return self._propose(queries, k, selected, count)

    def _propose(self, queries: Vectors, k: int, selected: Mask | None, count: int) -> Found:
        selection = None if selected is None else _exact.Selection(selected)
        # If one row in three may be found, three times as many must be looked at for the same recall.
        effort = len(self._column) / count
        steering = self._steer(selection.selector if selection else None, effort)
        wanted = min(k, count)
        _, rows = self._index.search(np.ascontiguousarray(queries), wanted, params=steering)
        found = _exact.ranked(queries, rows, self._column, self._space.metric, k)
        short = np.flatnonzero(found.rows[:, wanted - 1] < 0)
        if len(short):  # it gave up before it had found enough: those queries are answered exactly
            everything = np.ones(len(self._column), np.bool_) if selected is None else selected
            whole = _exact.search_column(queries[short], self._column, k, self._space, everything)
            found.scores[short], found.rows[short] = whole
        return found


def opened(kind: str, path: Path | None, flags: int, *, vectors: Stored, space: Space, steer: Steer) -> FaissIndex:
    """Map the index at `path` over the column it was built from.

    Raises:
        ValueError: there is no file, or it is not an index of a column of this shape.
    """
    if path is None:
        raise ValueError(f"{kind} needs its index file to open, and got none")
    index = faiss.read_index(str(path), flags)
    if (index.ntotal, index.d) != vectors.shape:
        raise ValueError(f"{path} indexes {index.ntotal} x {index.d} vectors, and the column has {vectors.shape}")
    return FaissIndex(kind, index, vectors=vectors, space=space, steer=steer)


def blocks(vectors: Stored, space: Space) -> Iterator[Vectors]:
    """The column in float32 pieces as FAISS is to index them, so that building needs no copy of all of it."""
    for start in range(0, len(vectors), _exact.BLOCK):
        yield _exact.prepared(vectors[start : start + _exact.BLOCK], space)
