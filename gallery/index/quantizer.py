"""Trained centroids that segments share, and the lists nearest to a query, found once for all of them.

Every index file keeps its copy of the centroids, so that it can be opened by itself. Equal copies are one `Quantizer` in a
process: what was found with it for one segment holds for the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import sqrt
from threading import Lock
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from gallery.arrays import Metric, Rows, Space, Stored, Vectors
from gallery.index import _exact
from gallery.index._library import faiss

# FAISS asks for at least this many training rows for each centroid.
FEWEST_ROWS_PER_LIST = 39
# Centroids serve until as many rows as they were trained for have become this many times more.
GROWTH = 4


class Care(NamedTuple):
    """How much goes into training, in all of which its time grows."""

    rows_per_list: int
    rounds: int


# More rows or more rounds do not make better lists. Fewer rounds do not suffice where there are more lists than clusters: after
# five, half as many more lists had to be read of 100,000 rows in 1,265.
THOROUGH = Care(64, 10)
# Says how much of so many lists must be read: of 200,000 rows in 1,789 lists 9 of 100, where thorough ones say 8 and take
# 17 times as long.
ROUGH = Care(8, 4)


class Nearest(NamedTuple):
    """The lists to read for some queries, best first.

    Attributes:
        scores: (queries, lists) float32: those of their centroids.
        lists: (queries, lists) int64, their numbers.
    """

    scores: Vectors
    lists: Rows

    def part(self, queries: NDArray[np.intp] | slice, lists: slice) -> Nearest:
        """Those of some queries and places, C-contiguous."""
        return Nearest(
            np.ascontiguousarray(self.scores[queries, lists]), np.ascontiguousarray(self.lists[queries, lists])
        )


class Quantizer:
    """Centroids (lists, dimension), and exact search among them; safe from many threads."""

    def __init__(self, centroids: Vectors, metric: Metric) -> None:
        self.centroids = centroids
        self.digest = digest(centroids)
        self._metric = metric
        self._longest = _exact.length(centroids)

    def __len__(self) -> int:
        """Lists."""
        return len(self.centroids)

    def nearest(self, queries: Vectors, count: int) -> Nearest:
        """The `count` lists to read, at most all, whatever else is in the batch.

        By the metric itself: for inner product of vectors of any length this raised recall@10 of 16 lists out of 224 on
        real embeddings from 0.73 and 0.93, with centroids of unit length, to 0.88 and 0.96.
        """
        if len(queries) < _exact.PRODUCT_QUERIES:
            found = _exact.knn(queries, self.centroids, count, self._metric)
            return Nearest(np.sqrt(found.scores) if self._metric == "euclidean" else found.scores, found.rows)
        return Nearest(*_exact.search(queries, self.centroids, count, self._metric, longest=self._longest))

    def holding(self, rows: Vectors) -> Rows:
        """The list (rows,) that each of some prepared rows is in: the nearest by distance, whatever the metric."""
        return _exact.search(rows, self.centroids, 1, "euclidean").rows[:, 0]


_open: WeakValueDictionary[tuple[Metric, str], Quantizer] = WeakValueDictionary()
_opening = Lock()


def shared(centroids: Vectors, metric: Metric) -> Quantizer:
    """The one quantizer of these centroids in this process."""
    with _opening:
        key = (metric, digest(centroids))
        found = _open.get(key)
        if found is None:
            found = _open[key] = Quantizer(centroids, metric)
        return found


def digest(centroids: Vectors) -> str:
    """What tells centroids from others: the first half of the SHA-256 of their bytes."""
    return hashlib.sha256(np.ascontiguousarray(centroids).data).hexdigest()[:32]


class Assignments:
    """The lists nearest to some queries, found once for each quantizer. Made for one search, used by one thread."""

    def __init__(self, queries: Vectors, *, roughly: bool = False, alone: bool = False) -> None:
        """For `queries` (queries, dimension) float32, which stay as they are.

        `roughly` where candidates for another comparison are looked for, of which an index need not prove that no better
        ones exist; `alone` where one index only is asked, so that nothing need be kept for others.
        """
        self.queries = np.ascontiguousarray(queries)
        self.roughly = roughly
        self.alone = alone
        self._found: dict[Quantizer, Nearest] = {}
        self._parts: dict[tuple[Quantizer, int], Nearest] = {}

    def of(self, quantizer: Quantizer, count: int) -> Nearest:
        """The `count` nearest lists, at most all; C-contiguous.

        Shelves read different numbers of them: whoever asks for more gets twice as many found, so that the next need not
        ask again.
        """
        part = self._parts.get((quantizer, count))
        if part is None:
            found = self._found.get(quantizer)
            if found is None:
                found = self._found[quantizer] = quantizer.nearest(self.queries, count)
            elif found.lists.shape[1] < count:
                found = self._found[quantizer] = quantizer.nearest(self.queries, min(2 * count, len(quantizer)))
            whole = found.lists.shape[1] == count
            part = self._parts[quantizer, count] = found if whole else found.part(slice(None), slice(count))
        return part


def wanted(rows: int, trainable: int) -> int:
    """How many lists suit a gallery of `rows` rows, of which `trainable` can be trained with."""
    return max(1, min(round(sqrt(rows)), trainable // FEWEST_ROWS_PER_LIST))


def serves(lists: int, wanted: int) -> bool:
    """Whether a gallery that would now be given `wanted` lists can go on with `lists`: they are its rows' square root."""
    return wanted**2 <= GROWTH * lists**2


def train(rows: Vectors, lists: int, space: Space, rounds: int = THOROUGH.rounds) -> Vectors:
    """Centroids (lists, dimension) of training rows (rows, dimension), which are prepared; the same rows give the same."""
    dimension = rows.shape[1]
    # By distance, whatever the metric: by inner product the longest centroid would draw most of the rows.
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dimension), dimension, lists, _exact.faiss_metric(space.metric))
    index.cp.seed = 1
    index.cp.niter = rounds
    index.cp.spherical = space.metric == "cosine"
    index.cp.min_points_per_centroid = 1  # few rows are no reason to print a warning
    index.train(rows)
    centroids: Vectors = index.quantizer.reconstruct_n(0, lists)
    return centroids


def training_rows(columns: Sequence[Stored], space: Space, lists: int, each: int = THOROUGH.rows_per_list) -> Vectors:
    """Rows of all columns as FAISS is to see them, `each` for a list; the seed is fixed, so training again gives the same."""
    ends = np.cumsum([len(column) for column in columns])
    total, count = int(ends[-1]), lists * each
    chosen = np.sort(np.random.default_rng(1).choice(total, min(count, total), replace=False))
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    starts = ends - [len(column) for column in columns]
    rows, at = np.empty((len(chosen), columns[0].shape[1]), np.float32), 0
    for column, part, start in zip(columns, parts, starts, strict=True):
        # One after the other, so that no more than one is there twice.
        rows[at : at + len(part)] = _exact.prepared(column[part - start], space)
        at += len(part)
    return rows
