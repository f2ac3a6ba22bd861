"""Trained centroids that segments share, and the lists nearest to a query, found once for all of them.

Every index file has a copy of the centroids, so that it can be opened by itself. In a process, equal copies are one
`Quantizer`, so what was found with it for one segment holds for the others.
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
# Centroids are used until the gallery has this many times the rows that they were trained for.
GROWTH = 4


class Care(NamedTuple):
    """How much work training is: its time grows with both."""

    rows_per_list: int
    rounds: int


# More rows or more rounds do not make better lists. Fewer rounds make worse ones where there are more lists than clusters:
# of 100,000 rows in 1,265 lists, half as many lists again had to be read after five rounds.
THOROUGH = Care(64, 10)
# Enough to estimate which share of the lists must be read: of 200,000 rows in 1,789 lists it says 9 %, where thorough
# training says 8 % and takes 17 times as long.
ROUGH = Care(8, 4)


class Nearest(NamedTuple):
    """The lists to read for some queries, best first.

    Attributes:
        scores: (queries, lists) float32, of the centroids of the lists.
        lists: (queries, lists) int64, the numbers of the lists.
    """

    scores: Vectors
    lists: Rows

    def part(self, queries: NDArray[np.intp] | slice, lists: slice) -> Nearest:
        """Some queries, and for these some places in the order; C-contiguous."""
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
        """How many lists there are."""
        return len(self.centroids)

    def nearest(self, queries: Vectors, count: int) -> Nearest:
        """The `count` lists to read, at most all; a query's lists do not depend on the rest of the batch.

        They are the nearest by the metric itself. For inner product of vectors of any length, this raised recall@10 of 16
        lists out of 224 on real embeddings from 0.73 and 0.93, with centroids of unit length, to 0.88 and 0.96.
        """
        if len(queries) < _exact.PRODUCT_QUERIES:
            found = _exact.knn(queries, self.centroids, count, self._metric)
            return Nearest(np.sqrt(found.scores) if self._metric == "euclidean" else found.scores, found.rows)
        return Nearest(*_exact.search(queries, self.centroids, count, self._metric, longest=self._longest))

    def holding(self, rows: Vectors) -> Rows:
        """The list (rows,) that each prepared row is in: the nearest by distance, whatever the metric."""
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
    """The first half of the SHA-256 of their bytes, by which centroids are told apart."""
    return hashlib.sha256(np.ascontiguousarray(centroids).data).hexdigest()[:32]


class Assignments:
    """The lists nearest to some queries, found once for each quantizer. Made for one search, used by one thread."""

    def __init__(self, queries: Vectors, *, roughly: bool = False, alone: bool = False) -> None:
        """Nothing is found yet.

        Args:
            queries: (queries, dimension) float32, never changed.
            roughly: the search is for candidates that something else compares again, so an index need not prove that it
                found the best.
            alone: only one index is asked, so nothing need be kept for others.
        """
        self.queries = np.ascontiguousarray(queries)
        self.roughly = roughly
        self.alone = alone
        self._found: dict[Quantizer, Nearest] = {}
        self._parts: dict[tuple[Quantizer, int], Nearest] = {}

    def of(self, quantizer: Quantizer, count: int) -> Nearest:
        """The `count` nearest lists, at most all; C-contiguous.

        Shelves read different numbers of lists. When more are asked for than were found, twice as many as that are found,
        so that the next shelf probably has enough.
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
    """Whether a gallery that would now get `wanted` lists can keep `lists`: both are square roots of numbers of rows."""
    return wanted**2 <= GROWTH * lists**2


def train(rows: Vectors, lists: int, space: Space, rounds: int = THOROUGH.rounds) -> Vectors:
    """Centroids (lists, dimension) of prepared training rows (rows, dimension); the same rows give the same centroids."""
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
    """Prepared rows drawn from all columns, `each` for every list; the seed is fixed, so training again gives the same."""
    ends = np.cumsum([len(column) for column in columns])
    total, count = int(ends[-1]), lists * each
    chosen = np.sort(np.random.default_rng(1).choice(total, min(count, total), replace=False))
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    starts = ends - [len(column) for column in columns]
    rows, at = np.empty((len(chosen), columns[0].shape[1]), np.float32), 0
    for column, part, start in zip(columns, parts, starts, strict=True):
        # One column after the other, so that the prepared copy of only one is in memory beside the result.
        rows[at : at + len(part)] = _exact.prepared(column[part - start], space)
        at += len(part)
    return rows
