"""FAISS HNSW-Flat: a graph of near rows in layers, and a search walks it towards the query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from gallery.arrays import Rows, Space, Stored
from gallery.index import _exact, _faiss, _parameters
from gallery.index._filtering import EXACT_ROWS_PER_PROPOSED
from gallery.index._library import faiss, one_thread
from gallery.index._parameters import Whole
from gallery.index.quantizer import Assignments

PARAMETERS = {
    "m": Whole(default=16, low=2, high=128),
    "ef_construction": Whole(default=200, low=4, high=4096),
    "ef_search": Whole(default=64, low=1, high=1 << 16),
}


class HnswIndex(_faiss.FaissIndex):
    """A graph that is searched where the file is mapped."""

    def __init__(self, index: Any, *, ef_search: int, vectors: Stored, space: Space) -> None:
        super().__init__("hnsw", vectors=vectors, space=space)
        self._graph = index
        self._ef_search = ef_search

    @property
    def reads(self) -> int:
        """The neighbours of all rows in view."""
        return int(self._column.shape[1]) * self._ef_search * int(self._graph.hnsw.nb_neighbors(0)) // 2

    def _propose(self, assigned: Assignments, count: int, effort: float) -> Rows:
        steer = faiss.SearchParametersHNSW(efSearch=ceil(self._ef_search * effort))
        rows: Rows = self._graph.search(assigned.queries, count, params=steer)[1]
        return rows


class Hnsw:
    """A navigable graph, mapped from disk.

    Parameters:
        m: how many neighbours a row keeps; memory and recall grow with it.
        ef_construction: how many rows are weighed for each row added; build time and recall grow with it.
        ef_search: how many rows a search keeps in view, at least k. May change after the build.
    """

    name = "hnsw"

    def build(self, vectors: Stored, *, space: Space, path: Path, parameters: Mapping[str, Any]) -> bool:
        """Add the column row by row and write the graph; the same column gives the same bytes."""
        index = faiss.IndexHNSWFlat(vectors.shape[1], parameters["m"], _exact.faiss_metric(space.metric))
        index.hnsw.efConstruction = parameters["ef_construction"]
        # Building a segment twice must equal building it once, so nothing may race for links. FAISS 1.15 gave the same bytes, no
        # sooner, with 1, 2 and 4 threads; it does not promise that, and releases before it add in parallel under locks.
        with one_thread():
            for block in _faiss.blocks(vectors, space):
                index.add(block)
        faiss.write_index(index, str(path))
        return True

    def open(self, vectors: Stored, *, space: Space, path: Path | None, parameters: Mapping[str, Any]) -> HnswIndex:
        """Map the graph; raises ValueError if the file does not fit the column."""
        index = _faiss.mapped(self.name, path, faiss.IO_FLAG_MMAP_IFC, vectors)
        return HnswIndex(index, ef_search=parameters["ef_search"], vectors=vectors, space=space)

    def check(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with defaults filled in; ValueError where one is unknown or out of range."""
        return _parameters.checked(self.name, parameters, PARAMETERS)

    def efforts(self, rows: int, total: int | None = None) -> Sequence[Mapping[str, Any]]:  # noqa: ARG002
        """Twice as many rows in view each time, while that costs less than an exact search."""
        last = rows // EXACT_ROWS_PER_PROPOSED
        seen = [PARAMETERS["ef_search"].default]
        while seen[-1] * 2 <= last:
            seen.append(seen[-1] * 2)
        return [self.check({"ef_search": ef_search}) for ef_search in seen]


BACKEND = Hnsw()
