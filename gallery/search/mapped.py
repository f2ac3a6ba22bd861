"""Stored vectors mapped into another space at query time, kept within a bound.

A column never changes and neither does a transformation, so what was mapped once is right for ever; the same candidates come
back with similar queries. Of a column only the rows that were mapped take memory, since searches want few of many. The columns
that were used longest ago go first.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gallery.arrays import Rows, Stored, Vectors
from gallery.index.base import Index
from gallery.index.registry import backend
from gallery.search.brief import NotBrief
from gallery.spaces import EmbeddingModel, Transformation
from gallery.transforms import SAMPLE_ROWS, Transforms
from gallery.vectors import as_read, scoreable
from gallery.views import Column

#: one or more transformations, each of which starts where the one before it leads to
By = tuple[Transformation, ...]
Models = Mapping[str, EmbeddingModel]
#: the ids of a column and of the transformations
_Key = tuple[int, ...]


class Asked(NamedTuple):
    """Some rows of one column."""

    column: Column
    #: of the column's segment; None where it has none
    side: Stored | None
    rows: Rows


class _Known:
    """The cached rows of one column in another space, in the order in which they were learned.

    Two threads may map the same row at once and learn the same numbers. A row is written before it is said to be known.
    """

    __slots__ = ("_places", "_vectors", "count")

    def __init__(self, rows: int, dimension: int) -> None:
        #: by row, where its vector is; -1 where it is not known
        self._places: NDArray[np.int32] = np.full(rows, -1, np.int32)
        self._vectors: Vectors = np.empty((0, dimension), np.float32)
        #: how many are known
        self.count = 0

    @property
    def nbytes(self) -> int:
        return self._places.nbytes + self._vectors.nbytes

    def missing(self, rows: Rows) -> Rows:
        return rows[self._places[rows] < 0]

    def of(self, rows: Rows) -> Vectors:
        """The vectors of rows that are known. Their places are read first: an array of more may take the vectors' place."""
        places = self._places[rows]
        return self._vectors[places]

    def learn(self, rows: Rows, vectors: Vectors) -> None:
        """Keep the vectors of some rows; by one thread at a time."""
        first, end = self.count, self.count + len(rows)
        if end > len(self._vectors):
            larger = np.empty((end + first // 2, vectors.shape[1]), np.float32)
            larger[:first] = self._vectors[:first]
            self._vectors = larger
        self._vectors[first:end] = vectors
        self._places[rows] = np.arange(first, end)
        self.count = end


class MappedColumns:
    """A bounded cache of mapped rows; safe from many threads."""

    def __init__(self, transforms: Transforms, limit_bytes: int) -> None:
        """Keep at most `limit_bytes`. What has no room in it, because too much is asked for at once, is mapped anew each time."""
        self._transforms = transforms
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._columns: OrderedDict[_Key, _Known] = OrderedDict()
        self._bytes = 0

    def take(self, asked: Sequence[Asked], by: By, models: Models, *, at_most: float = math.inf) -> Vectors:
        """The asked rows in the space that `by` leads to, in the order in which they are asked: (rows of all, dimension) float32.

        Rows that are not in the cache are mapped by one call, however many segments they come from.

        Raises:
            NotBrief: more than `at_most` weights would have to be applied for that.
        """
        target = models[by[-1].target]
        places = [self._place(each, by, target) for each in asked]
        wanted = [
            each.rows if known is None else known.missing(each.rows) for each, known in zip(asked, places, strict=True)
        ]
        if at_most < math.inf and sum(map(len, wanted)) * self._transforms.weights(by, stored=True) > at_most:
            raise NotBrief(by[-1].name)
        mapped = self._map([each._replace(rows=rows) for each, rows in zip(asked, wanted, strict=True)], by, models)
        taken = []
        for each, known, rows, vectors in zip(asked, places, wanted, mapped, strict=True):
            if known is None:
                taken.append(vectors)
            else:
                if len(rows):
                    self._learn(_key(each.column, by), known, rows, vectors)
                taken.append(known.of(each.rows))
        return np.concatenate(taken) if taken else np.empty((0, target.dimension), dtype=np.float32)

    def index(self, column: Column, side: Stored | None, by: By, models: Models) -> Index:
        """An exact index over a whole column in the space that `by` leads to.

        For queries that are not known in the column's own space: every row is then a candidate.
        """
        vectors = self.take([Asked(column, side, np.arange(len(column.vectors)))], by, models)
        return backend("flat").open(vectors, space=models[by[-1].target].space, path=None, parameters={})

    def _place(self, asked: Asked, by: By, target: EmbeddingModel) -> _Known | None:
        """What is known of a column; None if what is asked for is too much to be kept."""
        rows, size = len(asked.column.vectors), len(asked.rows) * target.dimension * 4
        if 4 * rows + size > self._limit:
            return None
        key = _key(asked.column, by)
        with self._lock:
            known = self._columns.get(key)
            if known is None:
                known = self._columns[key] = _Known(rows, target.dimension)
                self._bytes += known.nbytes
            self._columns.move_to_end(key)
            self._forget()
        return known

    def _learn(self, key: _Key, known: _Known, rows: Rows, vectors: Vectors) -> None:
        with self._lock:
            before = known.nbytes
            known.learn(rows, vectors)
            if self._columns.get(key) is known:  # else it had to go meanwhile
                self._bytes += known.nbytes - before
            self._forget()

    def _forget(self) -> None:
        """Let the oldest go, until what is left is within the bound; under the lock."""
        while self._bytes > self._limit:
            _, oldest = self._columns.popitem(last=False)
            self._bytes -= oldest.nbytes

    def _map(self, asked: Sequence[Asked], by: By, models: Models) -> list[Vectors]:
        """Map rows of several segments: those with side-information in one call, those without in another."""
        mapped: list[Vectors] = [np.empty((0, models[by[-1].target].dimension), dtype=np.float32)] * len(asked)
        takes_side = any(each.side_dimension is not None for each in by)
        for with_side in (True, False):
            chosen = [
                at
                for at, each in enumerate(asked)
                if len(each.rows) and (each.side is not None and takes_side) is with_side
            ]
            if not chosen:
                continue
            sides = [side[asked[at].rows] for at in chosen if with_side and (side := asked[at].side) is not None]
            vectors = np.concatenate([asked[at].column.vectors[asked[at].rows] for at in chosen])
            sample = partial(_sample, max((asked[at] for at in chosen), key=_rows), with_side=with_side)
            side = np.concatenate(sides) if sides else None
            result = scoreable(self._transforms.apply_all(by, models, vectors, side, sample))
            # A gallery has one number type: a hit's score is the one that it will have from its column of this space.
            result = as_read(result, vectors.dtype)
            ends = np.cumsum([len(asked[at].rows) for at in chosen])
            for at, part in zip(chosen, np.split(result, ends[:-1]), strict=True):
                mapped[at] = part
        return mapped


def _key(column: Column, by: By) -> _Key:
    return (column.id, *(each.id for each in by))


def _rows(asked: Asked) -> int:
    return len(asked.column.vectors)


def _sample(asked: Asked, *, with_side: bool) -> tuple[Vectors, Vectors | None]:
    """Rows from all over a column, with their side-information."""
    rows = np.unique(np.linspace(0, _rows(asked) - 1, SAMPLE_ROWS).astype(np.int64))
    return asked.column.vectors[rows], asked.side[rows] if with_side and asked.side is not None else None
