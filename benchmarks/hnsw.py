"""The graph that the bare endpoint serves, and how much of it a search must see to find as much as ours finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks.vectors import Data, K, recall

NEIGHBOURS, CONSTRUCTION = 16, 200
#: candidates in view to try, each a fifth more than the last: with coarser steps, the peer would have more recall than it needs,
#: and be slower for that. pgvector takes at most a thousand.
EFFORTS = [int(10 * 1.2**step) for step in range(26)]
#: how much less recall than ours a peer may have
TOLERANCE = 0.003


def build(data: Data) -> faiss.IndexHNSWFlat:
    """Build a graph over the items."""
    index = faiss.IndexHNSWFlat(data.items.shape[1], NEIGHBOURS)
    index.hnsw.efConstruction = CONSTRUCTION
    index.add(np.ascontiguousarray(data.items))
    return index


def save(index: faiss.IndexHNSWFlat, effort: int, path: Path) -> None:
    """Write a graph whose searches have so many candidates in view."""
    index.hnsw.efSearch = effort
    faiss.write_index(index, str(path))


def found_by(index: faiss.IndexHNSWFlat, data: Data) -> Callable[[int], list[list[str]]]:
    """What the graph finds at an effort, as ids by query."""

    def ask(effort: int) -> list[list[str]]:
        index.hnsw.efSearch = effort
        _, rows = index.search(data.queries, K)
        return [[str(row) for row in each] for each in rows.tolist()]

    return ask


def least_effort(ask: Callable[[int], list[list[str]]], truth: NDArray[np.int64], wanted: float) -> tuple[int, float]:
    """The least effort whose recall is at least `wanted`, less the tolerance, and that recall.

    All that there is to try may find less: then the most is taken, and the recall that is shown says so.
    """
    for effort in EFFORTS:
        found = recall(ask(effort), truth)
        if found >= wanted - TOLERANCE:
            break
    return effort, found
