"""What the approximate FAISS indexes share: reading a column block by block, mapping, and searching."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gallery.arrays import Rows, Space, Stored, Vectors
from gallery.index import _exact
from gallery.index._filtering import How, how, pool
from gallery.index._library import faiss
from gallery.index.base import Found, Index, Joins
from gallery.index.quantizer import Assignments
from gallery.index.selection import Selected
from gallery.index.stack import Stack


class FaissIndex(ABC):
    """A FAISS index that proposes rows, which are then scored exactly from the column.

    The FAISS object is never changed after opening: everything that steers a search is passed with the search, so any
    number of threads may search at once.
    """

    joins: Joins | None = None
    #: whether `_select` reads lists
    by_lists: ClassVar[bool] = False

    def __init__(self, kind: str, *, vectors: Stored | Stack, space: Space) -> None:
        self.kind = kind
        self._column = vectors if isinstance(vectors, Stack) else np.asarray(vectors)
        self.space = space

    def search(
        self, queries: Vectors, k: int, selected: Selected | None = None, assigned: Assignments | None = None
    ) -> Found:
        """The `k` best rows for each query, as `base.Index.search` says."""
        _exact.check_request(queries, k, selected, self._column.shape)
        total = len(self._column)
        count = total if selected is None else selected.count
        if not count or not len(queries):
            return _exact.nothing(len(queries), k, self.space.metric)
        if assigned is None or assigned.queries is not queries:
            assigned = Assignments(queries, alone=True)
        if selected is None or count == total:
            return self._sieve(assigned, k, None)
        way = how(total, count, k, by_lists=self.by_lists)
        if way is How.EXACT:
            return _exact.search_column(queries, self._column, k, self.space, selected)
        if way is How.LISTS:
            return self._select(assigned, k, selected)
        return self._sieve(assigned, k, selected)

    @property
    @abstractmethod
    def reads(self) -> int:
        """Numbers that are read for one query, more or less."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to make
        """Nothing, where the file is searched as it is mapped."""

    def join(self, others: Sequence[Index]) -> Index:
        """Nothing is joined, unless `joins` says so."""
        raise NotImplementedError(f"{self.kind} is asked alone, and not with {len(others)} others")

    def compared(self, k: int, *, roughly: bool = False) -> int:  # noqa: ARG002
        """How many rows are scored exactly to get the best `k`: more than `k` where the index holds rounded vectors."""
        return k

    def _found(self, assigned: Assignments, k: int, count: int, effort: float, selected: Selected | None) -> Found:
        """The `k` best of the `count` rows that FAISS proposes; -1 where fewer of them are selected.

        `effort`, at least 1, is how many times as hard to look as in a search of all rows.
        """
        return self._ranked(assigned.queries, k, self._propose(assigned, count, effort), selected)

    @abstractmethod
    def _propose(self, assigned: Assignments, count: int, effort: float) -> Rows:
        """`count` rows (queries, count) that FAISS finds best; -1 where it finds fewer."""

    def _select(self, assigned: Assignments, k: int, selected: Selected) -> Found:
        """The `k` best of the selected rows, by comparing those only; an index of lists need not compare all of them."""
        return _exact.search_column(assigned.queries, self._column, k, self.space, selected)

    def _sieve(self, assigned: Assignments, k: int, selected: Selected | None) -> Found:
        """Let FAISS propose rows, and answer in another way the queries for which it proposed too few.

        The selection is applied to what FAISS proposes and not handed to it. Its own filter stops when the
        neighbourhood of the query is searched, whether or not selected rows were there: with 2,500 selected of 6,000,
        all far from the query, it found 10 rows and none of the 10 best. Here it is noticed when too few are left.
        """
        total = len(self._column)
        effort = 1.0 if selected is None else total / selected.count
        found = self._found(
            assigned, k, min(pool(self.compared(k, roughly=assigned.roughly), effort), total), effort, selected
        )
        last = min(k, total) - 1
        short = [at for at in range(len(found.rows)) if found.rows[at, last] < 0]
        if short:
            found.scores[short], found.rows[short] = self._thoroughly(assigned.queries[short], k, selected)
        return found

    def _thoroughly(self, queries: Vectors, k: int, selected: Selected | None) -> Found:
        """Find the `k` best where a usual search found too few: few selected rows are near, or the lists read were short."""
        if selected is None:
            return _exact.search_column(queries, self._column, k, self.space, None)
        return self._select(Assignments(queries), k, selected)

    def _ranked(self, queries: Vectors, k: int, rows: Rows, selected: Selected | None) -> Found:
        """The `k` best of the rows (queries, n) that are selected."""
        return _exact.ranked(queries, only(rows, selected), self._column, self.space, k)


def only(rows: Rows, selected: Selected | None) -> Rows:
    """The same rows, -1 where not selected. (A row of -1 looks up the last row's mark, and is -1 either way.)"""
    return rows if selected is None else np.where(selected.mask[rows], rows, -1)


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
