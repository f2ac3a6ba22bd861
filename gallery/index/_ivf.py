"""What all indexes of inverted lists share: building and reading them. They differ in what a list holds of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gallery.arrays import Rows, Space, Stored, Vectors
from gallery.index import _exact, _faiss, _parameters
from gallery.index._library import faiss
from gallery.index._parameters import Whole
from gallery.index.base import Found, Trained
from gallery.index.quantizer import THOROUGH, Assignments, Nearest, serves, shared, train, training_rows, wanted
from gallery.index.scores import cut
from gallery.index.selection import Selected
from gallery.index.stack import Stack

PARAMETERS = {
    "nlist": Whole(default=0, low=0, high=1 << 20),  # 0: as many as suit the number of rows
    "nprobe": Whole(default=32, low=1, high=1 << 20),
}

# The fewest lists that a search is tried with: with fewer it costs no less.
_FIRST_PROBES = 8


class IvfIndex(_faiss.FaissIndex):
    """Lists of rows, of which a search reads the nearest few; these are found once for all segments with the same centroids."""

    by_lists = True

    def __init__(self, kind: str, centroids: Vectors, *, nprobe: int, vectors: Stored | Stack, space: Space) -> None:
        super().__init__(kind, vectors=vectors, space=space)
        self.quantizer = shared(centroids, space.metric)
        self.nprobe = min(nprobe, len(self.quantizer))
        self._usual = faiss.SearchParametersIVF(nprobe=self.nprobe)  # making it takes longer than to read a short list

    @property
    @abstractmethod
    def lists(self) -> Any:
        """The FAISS index that holds them."""

    @property
    def reads(self) -> int:
        """All centroids, and the rows in the lists that are read."""
        lists, (rows, dimension) = max(1, len(self.quantizer)), self._column.shape
        return int(dimension * (lists + rows * self.nprobe // lists))

    def places(self, queries: Vectors, rows: Rows) -> Rows:
        """For rows (queries, n): how many lists a search of the query reads before the one that holds the row, (queries, n)."""
        centroids, metric = self.quantizer.centroids, self.space.metric
        vectors = _exact.prepared(_exact.taken(self._column, rows.reshape(-1)), self.space)
        near = queries @ centroids.T
        if metric == "euclidean":
            near -= np.einsum("ld,ld->l", centroids, centroids) / 2
        own = np.take_along_axis(near, self.quantizer.holding(vectors).reshape(rows.shape), axis=1)
        return np.stack([(near > own[:, at, None]).sum(axis=1) for at in range(rows.shape[1])], axis=1)

    def _propose(self, assigned: Assignments, count: int, effort: float) -> Rows:
        return self._read(assigned.queries, count, self._near(assigned, effort), None).rows

    def _near(self, assigned: Assignments, effort: float) -> Nearest | None:
        """The lists that a search reads; None where FAISS may find them itself, within the same call."""
        return self._lists_near(assigned, effort)

    def _lists_near(self, assigned: Assignments, effort: float) -> Nearest:
        return assigned.of(self.quantizer, min(ceil(self.nprobe * effort), len(self.quantizer)))

    def _within(self, queries: Vectors, k: int, near: Nearest, selected: Selected, *, roughly: bool) -> Found:
        """The `k` best of the selected rows in the lists that are `near`; `roughly` as in `Assignments`."""
        count = min(self.compared(k, roughly=roughly), selected.count)
        return self._ranked(queries, k, self._read(queries, count, near, selected).rows, None)

    def _select(self, assigned: Assignments, k: int, selected: Selected) -> Found:
        """The `k` best of the selected rows: twice as many lists each time, until that changes nothing.

        To have found `k` rows does not mean that they are the best: with 2,500 selected of 6,000, all far from the query, the
        nearest lists held 10 rows and none of the 10 best. The first round reads more lists than usual, because fewer
        selected rows lie farther apart: more by the root of the number of rows for each selected one.
        """
        queries, metric = assigned.queries, self.space.metric
        best = _exact.nothing(len(queries), k, metric)
        asking, first = np.arange(len(queries)), 0
        last = ceil(2 * self.nprobe * sqrt(len(selected.mask) / selected.count))
        while len(asking) and first < len(self.quantizer):
            last = min(last, len(self.quantizer))
            near = assigned.of(self.quantizer, last).part(asking, slice(first, last))
            more = self._within(queries[asking], k, near, selected, roughly=assigned.roughly)
            before = best.rows[asking]
            both = np.hstack([best.scores[asking], more.scores]), np.hstack([before, more.rows])
            found = Found(*cut(*both, metric, k))
            settled = (found.rows == before).all(axis=1) & (found.rows[:, -1] >= 0)
            best.scores[asking], best.rows[asking] = found
            asking, first, last = asking[~settled], last, 2 * last
        return best

    def _read(self, queries: Vectors, count: int, near: Nearest | None, selected: Selected | None) -> Found:
        """The `count` best rows (queries, count) of the lists that are `near`, by FAISS's own scores; -1 where fewer are."""
        width = self.nprobe if near is None else near.lists.shape[1]
        steer = self._usual
        if selected is not None or width != self.nprobe:
            steer = faiss.SearchParametersIVF(nprobe=width, sel=None if selected is None else selected.selector)
        read = Found(np.empty((len(queries), count), np.float32), np.empty((len(queries), count), np.int64))
        x, scores, rows = map(faiss.swig_ptr, (queries, *read))
        if near is None:
            self.lists.search_c(len(queries), x, count, scores, rows, steer)
        else:
            lists, by = map(faiss.swig_ptr, (near.lists, near.scores))
            self.lists.search_preassigned_c(len(queries), x, count, lists, by, scores, rows, False, steer)
        return read


class MappedIndex(IvfIndex):
    """Lists that are read where the file is mapped."""

    def __init__(self, kind: str, lists: Any, **named: Any) -> None:
        super().__init__(kind, centroids_of(lists), **named)
        self._lists = lists

    @property
    def lists(self) -> Any:
        """The mapped FAISS index."""
        return self._lists


class Lists(ABC):
    """Inverted lists over a trained coarse quantizer.

    Parameters:
        nlist: how many lists; 0 chooses the square root of the number of rows. Never more than there are rows.
        nprobe: how many of them a search reads; all of them make it exact. May change after the build.
    """

    name: ClassVar[str]
    reaches: ClassVar[bool] = False
    parameters: ClassVar[Mapping[str, Whole]] = PARAMETERS

    def build(
        self,
        vectors: Stored,
        *,
        space: Space,
        path: Path,
        parameters: Mapping[str, Any],
        trained: Trained | None = None,
    ) -> bool:
        """Put the rows into the lists of `trained`, else of some trained with the column itself, and write them.

        The same column and lists give the same bytes.
        """
        if trained is None:
            lists = min(parameters["nlist"] or _count(len(vectors)), len(vectors))
            trained = self.train(training_rows([vectors], space, lists), lists, space)
        index = self._empty(trained, space, vectors)
        for block in _faiss.blocks(vectors, space):
            index.add(block)
        _probe_by_score(index)
        faiss.write_index(index, str(path))
        return True

    @abstractmethod
    def open(self, vectors: Stored, *, space: Space, path: Path | None, parameters: Mapping[str, Any]) -> IvfIndex:
        """Map the lists; raises ValueError if the file does not fit the column."""

    def _most(self, lists: int, rows: int) -> int:  # noqa: ARG002
        """The most lists that a search may read: to read half of them costs as much as to compare all of 20,000 x 128 rows."""
        return lists // 3

    @abstractmethod
    def _empty(self, trained: Trained, space: Space, vectors: Stored) -> Any:
        """A FAISS index of those lists, ready for the rows of `vectors`."""

    def train(self, rows: Vectors, lists: int, space: Space, rounds: int = THOROUGH.rounds) -> Trained:
        """Centroids of `lists` lists."""
        return Trained(train(rows, lists, space, rounds))

    def trained(self, path: Path) -> Trained:
        """What an index file was built with."""
        return Trained(centroids_of(faiss.read_index(str(path), faiss.IO_FLAG_MMAP)))

    def lists(self, parameters: Mapping[str, Any], rows: int, trainable: int) -> int:
        """How many lists suit a gallery of `rows` rows, where `trainable` rows can be trained with."""
        asked: int = parameters["nlist"]
        return min(asked, trainable) if asked else wanted(rows, trainable)

    def serves(self, parameters: Mapping[str, Any], lists: int, now: int) -> bool:
        """Whether a gallery can keep its `lists` lists, though it would `now` get another number."""
        return lists == now if parameters["nlist"] else serves(lists, now)

    def check(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with defaults filled in; ValueError where one is unknown or out of range."""
        return _parameters.checked(self.name, parameters, self.parameters)

    def efforts(self, rows: int, total: int | None = None) -> Sequence[Mapping[str, Any]]:
        """More and more lists, up to where another kind of index would cost less."""
        lists = _count(total or rows)
        last = max(_FIRST_PROBES, self._most(lists, total or rows))
        probes = [_FIRST_PROBES]
        while probes[-1] < last:
            probes.append(min(last, ceil(1.5 * probes[-1])))
        return [self.check({"nprobe": nprobe}) for nprobe in probes]


def by_distance(centroids: Vectors) -> Any:
    """A FAISS quantizer that puts each row into the list of the nearest centroid by distance, whatever the metric.

    By inner product the longest centroid would draw most of the rows.
    """
    quantizer = faiss.IndexFlatL2(centroids.shape[1])
    quantizer.add(centroids)
    return quantizer


def centroids_of(index: Any) -> Vectors:
    """The centroids (lists, dimension) of a FAISS index."""
    centroids: Vectors = index.quantizer.reconstruct_n(0, index.nlist)
    return centroids


def _count(rows: int) -> int:
    """How many lists a segment gets if the parameters do not say."""
    return max(1, round(sqrt(rows)))


def _probe_by_score(index: Any) -> None:
    """Make the file choose lists by the metric, as `Quantizer.nearest` does, for those who search it with FAISS alone."""
    if index.metric_type == faiss.METRIC_INNER_PRODUCT:
        by_score = faiss.IndexFlatIP(index.d)
        by_score.add(index.quantizer.reconstruct_n(0, index.nlist))
        choose_lists_by(index, by_score)


def choose_lists_by(index: Any, quantizer: Any) -> None:
    """Make a FAISS index of lists own another quantizer: in Python nobody does once it is assigned, and it would never be freed.

    The one that the index was made with must be somebody else's.
    """
    index.quantizer, index.own_fields = quantizer, True
