"""What the kinds of inverted lists share: building them on centroids, and reading them. They differ in what a list holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from gallery.arrays import Mask, Rows, Space, Stored, Vectors
from gallery.index import _exact, _faiss, _parameters
from gallery.index._library import faiss
from gallery.index._parameters import Whole
from gallery.index.base import Found
from gallery.index.quantizer import Assignments, Nearest, Quantizer, serves, shared, train, training_rows, wanted

PARAMETERS = {
    "nlist": Whole(default=0, low=0, high=1 << 20),  # 0: as many as suit the number of rows
    "nprobe": Whole(default=32, low=1, high=1 << 20),
}

# An empty FAISS index of a quantizer, dimension, number of lists and metric.
Empty = Callable[[Any, int, int, int], Any]

# The fewest lists that are tried; with fewer, a search costs no less.
_FIRST_PROBES = 8


class IvfIndex(_faiss.FaissIndex):
    """Lists that are read where the file is mapped. Which to read is found once for all segments with the same lists."""

    by_lists = True

    def __init__(
        self, index: Any, *, quantizer: Quantizer, nprobe: int, rerank: int, kind: str, vectors: Stored, space: Space
    ) -> None:
        super().__init__(kind, index, vectors=vectors, space=space)
        self.quantizer = quantizer
        self.rerank = rerank
        self._nprobe = min(nprobe, len(quantizer))
        self._usual = faiss.SearchParametersIVF(nprobe=self._nprobe)  # making it takes longer than to read a short list

    def _propose(self, assigned: Assignments, count: int, effort: float) -> Rows:
        width = min(ceil(self._nprobe * effort), len(self.quantizer))
        count = min(count * self.rerank, len(self._column))
        return self._read(assigned.queries, count, assigned.of(self.quantizer, width), None)

    def _select(self, assigned: Assignments, k: int, selected: Mask) -> Found:
        """The `k` best of the selected rows: twice as many lists each time, until that changes nothing.

        Rows enough are no sign that they are the best: with 2,500 selected of 6,000, all far from the query, the nearest
        lists held 10 rows and none of the 10 best. The first lists are more than usual, because fewer selected rows lie
        farther apart; by no more than the root of how many are left out, because so are those in the lists.
        """
        queries, selection = assigned.queries, _exact.Selection(selected)
        best = _exact.nothing(len(queries), k, self._space.metric)
        asking, first = np.arange(len(queries)), 0
        last = ceil(2 * self._nprobe * sqrt(len(selected) / np.count_nonzero(selected)))
        while len(asking) and first < len(self.quantizer):
            last = min(last, len(self.quantizer))
            near = assigned.of(self.quantizer, last).part(asking, slice(first, last))
            rows = self._read(queries[asking], k * self.rerank, near, selection.selector)
            rows = np.concatenate([best.rows[asking], rows], axis=1)
            found = _exact.ranked(queries[asking], rows, self._column, self._space, k)
            settled = (found.rows == best.rows[asking]).all(axis=1) & (found.rows[:, -1] >= 0)
            best.scores[asking], best.rows[asking] = found
            asking, first, last = asking[~settled], last, 2 * last
        return best

    def _read(self, queries: Vectors, count: int, near: Nearest, selector: Any) -> Rows:
        """The `count` best rows (queries, count) of the lists that are `near`; -1 where they hold fewer."""
        width = near.lists.shape[1]
        steer = self._usual
        if selector is not None or width != self._nprobe:
            steer = faiss.SearchParametersIVF(nprobe=width, sel=selector)
        scores, rows = np.empty((len(queries), count), np.float32), np.empty((len(queries), count), np.int64)
        x, lists, by, found, ids = map(faiss.swig_ptr, (queries, near.lists, near.scores, scores, rows))
        self._index.search_preassigned_c(len(queries), x, count, lists, by, found, ids, False, steer)
        return rows


class Lists:
    """Inverted lists over a trained coarse quantizer, mapped from disk.

    Parameters:
        nlist: how many lists; 0 chooses the square root of the number of rows. Never more than there are rows.
        nprobe: how many of them a search reads; all of them make it exact. May change after the build.
    """

    def __init__(self, name: str, empty: Empty, parameters: Mapping[str, Whole]) -> None:
        self.name = name
        self._faiss = empty
        self._parameters = parameters

    def build(
        self,
        vectors: Stored,
        *,
        space: Space,
        path: Path,
        parameters: Mapping[str, Any],
        centroids: Vectors | None = None,
    ) -> bool:
        """Put the rows into the lists of `centroids`, else of some trained with the column itself, and write them.

        The same column and centroids give the same bytes.
        """
        if centroids is None:
            lists = min(parameters["nlist"] or _lists(len(vectors)), len(vectors))
            centroids = train(training_rows([vectors], space, lists), lists, space)
        index = self._empty(centroids, space, vectors)
        for block in _faiss.blocks(vectors, space):
            index.add(block)
        _probe_by_score(index)
        faiss.write_index(index, str(path))
        return True

    def open(self, vectors: Stored, *, space: Space, path: Path | None, parameters: Mapping[str, Any]) -> IvfIndex:
        """Map the lists; raises ValueError if the file does not fit the column."""
        index = _faiss.mapped(self.name, path, faiss.IO_FLAG_MMAP, vectors)
        quantizer = shared(_centroids(index), space.metric)
        return IvfIndex(
            index,
            quantizer=quantizer,
            nprobe=parameters["nprobe"],
            rerank=parameters.get("rerank", 1),
            kind=self.name,
            vectors=vectors,
            space=space,
        )

    def lists(self, parameters: Mapping[str, Any], rows: int, trainable: int) -> int:
        """How many lists suit a gallery of `rows` rows, where `trainable` rows can be trained with."""
        asked: int = parameters["nlist"]
        return min(asked, trainable) if asked else wanted(rows, trainable)

    def serves(self, parameters: Mapping[str, Any], lists: int, now: int) -> bool:
        """Whether a gallery that would `now` be given so many lists can go on with `lists`."""
        return lists == now if parameters["nlist"] else serves(lists, now)

    def centroids(self, path: Path) -> Vectors:
        """The centroids of an index file."""
        return _centroids(faiss.read_index(str(path), faiss.IO_FLAG_MMAP))

    def check(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with defaults filled in; ValueError where one is unknown or out of range."""
        return _parameters.checked(self.name, parameters, self._parameters)

    def efforts(self, rows: int, total: int | None = None) -> Sequence[Mapping[str, Any]]:
        """More and more lists, up to a third of them: half cost as much as a plain scan of 20,000 x 128 rows."""
        last = max(_FIRST_PROBES, _lists(total or rows) // 3)
        probes = [_FIRST_PROBES]
        while probes[-1] < last:
            probes.append(min(last, ceil(1.5 * probes[-1])))
        return [self.check({"nprobe": nprobe}) for nprobe in probes]

    def _empty(self, centroids: Vectors, space: Space, vectors: Stored) -> Any:
        """An index without rows, whose lists are those of the centroids nearest by distance, whatever the metric.

        Rows must not be assigned by inner product: the longest centroid would draw most of them.
        """
        lists, dimension = centroids.shape
        by_distance = faiss.IndexFlatL2(dimension)
        by_distance.add(centroids)
        index = self._faiss(by_distance, dimension, lists, _exact.faiss_metric(space.metric))
        if len(vectors) and not index.is_trained:
            index.train(training_rows([vectors], space, lists))  # what is in the lists; the centroids are left alone
        return index


def _lists(rows: int) -> int:
    """How many lists a segment has where nobody says."""
    return max(1, round(sqrt(rows)))


def _probe_by_score(index: Any) -> None:
    """Let whoever searches the file by itself choose lists by the metric, as `Quantizer.nearest` does."""
    if index.metric_type == faiss.METRIC_INNER_PRODUCT:
        by_score = faiss.IndexFlatIP(index.d)
        by_score.add(index.quantizer.reconstruct_n(0, index.nlist))
        index.quantizer = by_score


def _centroids(index: Any) -> Vectors:
    centroids: Vectors = index.quantizer.reconstruct_n(0, index.nlist)
    return centroids
