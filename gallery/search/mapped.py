"""Stored vectors mapped into another space at query time, kept within a bound.

A column never changes and neither does a transformation, so what was mapped once is right for ever; the same candidates come
back with similar queries. A column's mapped rows are kept as one array and a mask of what is known; the columns that were
used longest ago go first.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

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


class Asked(NamedTuple):
    """Some rows of one column."""

    column: Column
    #: of the column's segment; None where it has none
    side: Stored | None
    rows: Rows


class _Known:
    """The cached rows of one column in another space.

    Two threads may map the same row at once and write the same numbers. A row is written before it is said to be known.
    """

    __slots__ = ("known", "vectors")

    def __init__(self, rows: int, dimension: int) -> None:
        self.vectors: Vectors = np.empty((rows, dimension), dtype=np.float32)
        self.known = np.zeros(rows, dtype=np.bool_)

    def missing(self, rows: Rows) -> Rows:
        return rows[~self.known[rows]]

    def learn(self, rows: Rows, vectors: Vectors) -> None:
        self.vectors[rows] = vectors
        self.known[rows] = True


class MappedColumns:
    """A bounded cache of mapped rows; safe from many threads."""

    def __init__(self, transforms: Transforms, limit_bytes: int) -> None:
        """Keep at most `limit_bytes` of vectors. A column that alone is larger is mapped anew each time."""
        self._transforms = transforms
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._columns: OrderedDict[tuple[int, ...], _Known] = OrderedDict()
        self._bytes = 0

    def take(self, asked: Sequence[Asked], by: By, models: Models, *, at_most: float = math.inf) -> Vectors:
        """The asked rows in the space that `by` leads to, in the order in which they are asked: (rows of all, dimension) float32.

        Rows that are not in the cache are mapped by one call, however many segments they come from.

        Raises:
            NotBrief: more than `at_most` weights would have to be applied for that.
        """
        target = models[by[-1].target]
        places = [self._place(each.column, by, target) for each in asked]
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
                    known.learn(rows, vectors)
                taken.append(known.vectors[each.rows])
        return np.concatenate(taken) if taken else np.empty((0, target.dimension), dtype=np.float32)

    def index(self, column: Column, side: Stored | None, by: By, models: Models) -> Index:
        """An exact index over a whole column in the space that `by` leads to.

        For queries that are not known in the column's own space: every row is then a candidate.
        """
        vectors = self.take([Asked(column, side, np.arange(len(column.vectors)))], by, models)
        return backend("flat").open(vectors, space=models[by[-1].target].space, path=None, parameters={})

    def _place(self, column: Column, by: By, target: EmbeddingModel) -> _Known | None:
        """Where the mapped rows of a column are kept; None if it is too large to be kept."""
        key, size = (column.id, *(each.id for each in by)), len(column.vectors) * target.dimension * 4
        if size > self._limit:
            return None
        with self._lock:
            known = self._columns.get(key)
            if known is None:
                known = self._columns[key] = _Known(len(column.vectors), target.dimension)
                self._bytes += size
            self._columns.move_to_end(key)
            while self._bytes > self._limit:
                _, oldest = self._columns.popitem(last=False)
                self._bytes -= oldest.vectors.nbytes
        return known

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


def _rows(asked: Asked) -> int:
    return len(asked.column.vectors)


def _sample(asked: Asked, *, with_side: bool) -> tuple[Vectors, Vectors | None]:
    """Rows from all over a column, with their side-information."""
    rows = np.unique(np.linspace(0, _rows(asked) - 1, SAMPLE_ROWS).astype(np.int64))
    return asked.column.vectors[rows], asked.side[rows] if with_side and asked.side is not None else None
