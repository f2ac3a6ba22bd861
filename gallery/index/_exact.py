"""Exact search, by FAISS's functions on plain arrays: what `flat` is, and what the others fall back to."""

from __future__ import annotations

from typing import Any

import numpy as np

from gallery.arrays import Mask, Metric, Rows, Space, Stored, Vectors
from gallery.index._library import faiss
from gallery.index.base import Found
from gallery.index.scores import cut, score, unit

# How many rows are converted to float32 at a time: 16 MB at 512 dimensions.
BLOCK = 8192


def is_plain(vectors: Stored, space: Space) -> bool:
    """Whether FAISS can read `vectors` where they lie and rank them right.

    float16 columns of unit length are not plain: rounded, their lengths differ by 1e-3, which would decide the order.
    """
    as_stored = space.normalized or space.metric != "cosine"
    return vectors.dtype == np.float32 and vectors.flags.c_contiguous and vectors.flags.aligned and as_stored


def prepared(vectors: Stored, space: Space) -> Vectors:
    """`vectors` (rows, dimension) as FAISS is to rank them: float32, C-contiguous, of unit length where cosine."""
    if space.metric == "cosine":
        return np.ascontiguousarray(unit(vectors))
    return np.ascontiguousarray(vectors, dtype=np.float32)


def faiss_metric(metric: Metric) -> int:
    """FAISS's number for the metric over prepared vectors."""
    number: int = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
    return number


def check_request(queries: Vectors, k: int, selected: Mask | None, shape: tuple[int, ...]) -> None:
    """Refuse what would make FAISS read beyond the end of an array: it takes bare pointers.

    Raises:
        ValueError: the queries or the selection do not fit a column of this shape, or k is below 1.
    """
    rows, dimension = shape
    if queries.ndim != 2 or queries.shape[1] != dimension or queries.dtype != np.float32:
        raise ValueError(f"queries must be (n, {dimension}) float32, not {queries.shape} {queries.dtype}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if selected is not None and (selected.shape != (rows,) or selected.dtype != np.bool_):
        raise ValueError(f"selected must be ({rows},) bool, not {selected.shape} {selected.dtype}")


class Selection:
    """A mask as FAISS wants it. The bits live as long as the selector, which only points at them."""

    def __init__(self, selected: Mask) -> None:
        self._bits = np.packbits(selected, bitorder="little")
        self.selector = faiss.IDSelectorBitmap(len(self._bits), faiss.swig_ptr(self._bits))


def search_plain(queries: Vectors, vectors: Vectors, k: int, metric: Metric, selection: Selection | None) -> Rows:
    """The rows (queries, k) of the `k` best of `vectors`, in no promised order; -1 where there are fewer.

    Args:
        queries: (queries, dimension) float32, C-contiguous.
        vectors: (rows, dimension) float32, C-contiguous, read where they lie.
        k: from 1 to the number of rows.
        metric: decides the score.
        selection: which rows may be found. None means all.
    """
    # A selector also keeps FAISS from its matrix product for many queries, which ranks |x|^2 + |y|^2 - 2xy: far from
    # the origin that finds wrong rows (three zeros for vectors 0.02 apart at length 1,100). It costs a third of the
    # throughput at 64 queries and nothing below 16.
    selector = selection.selector if selection else faiss.IDSelectorAll()
    queries = np.ascontiguousarray(queries)
    rows = np.empty((len(queries), k), np.int64)
    scores = np.empty((len(queries), k), np.float32)
    x, y, dis, ids = (faiss.swig_ptr(array) for array in (queries, vectors, scores, rows))
    sizes: tuple[Any, ...] = (vectors.shape[1], len(queries), len(vectors), k)
    if metric == "euclidean":
        faiss.knn_L2sqr(x, y, *sizes, dis, ids, None, selector)
    else:
        faiss.knn_inner_product(x, y, *sizes, dis, ids, selector)
    return rows


def search_column(queries: Vectors, column: Stored, k: int, space: Space, selected: Mask) -> Found:
    """Exact search of the selected rows of a column of any kind, without a copy of the whole of it.

    Args:
        queries: (queries, dimension) float32; of unit length where the metric is cosine.
        column: (rows, dimension) float32 or float16.
        k: how many rows.
        space: decides the score.
        selected: (rows,) bool.
    """
    if is_plain(column, space):
        rows = search_plain(queries, column, min(k, len(column)), space.metric, Selection(selected))
        return ranked(queries, rows, column, space.metric, k)
    chosen = np.flatnonzero(selected)
    best = nothing(len(queries), k, space.metric)
    for start in range(0, len(chosen), BLOCK):
        block = chosen[start : start + BLOCK]
        vectors = prepared(column[block], space)
        rows = block[search_plain(queries, vectors, min(k, len(block)), space.metric, None)]
        found = ranked(queries, rows, column, space.metric, k)
        best = Found(*cut(np.hstack([best.scores, found.scores]), np.hstack([best.rows, found.rows]), space.metric, k))
    return best


def ranked(queries: Vectors, rows: Rows, column: Stored, metric: Metric, k: int) -> Found:
    """The `k` best of the rows (queries, candidates) that a search found, with their exact scores; -1 is no row."""
    candidates = column[np.maximum(rows, 0)]  # (queries, candidates, dimension)
    return Found(*cut(score(queries, candidates, metric), rows, metric, k))


def nothing(queries: int, k: int, metric: Metric) -> Found:
    """The answer of a segment that has no row to give."""
    none = np.full((queries, k), -1, np.int64)
    return Found(*cut(np.zeros((queries, k), np.float32), none, metric, k))
