"""Exact search, by FAISS's functions on plain arrays: what `flat` is, and what the others fall back to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from gallery import errors
from gallery.arrays import Metric, Rows, Space, Stored, Vectors
from gallery.index._library import ONE_BY_ONE, faiss
from gallery.index.base import Found
from gallery.index.scores import cut, head, score, score_rows, unit, worst
from gallery.index.selection import Selected
from gallery.index.stack import Stack

# How many rows are converted to float32 at a time: 16 MB at 512 dimensions.
BLOCK = 8192
# From how many queries on a matrix product is faster than one query after the other.
PRODUCT_QUERIES = 8
# How many more rows than wanted a matrix product proposes, so that its rounding seldom keeps one of the best out.
SLACK = 16
# Where fewer than one row in this many is selected, the selected rows are copied and searched, also for a lone query: to ask
# of every row whether it is selected would cost more.
SPARSE = 20


def is_plain(vectors: Stored | Stack, space: Space) -> TypeGuard[Vectors]:
    """Whether FAISS can read `vectors` where they lie and rank them right.

    float16 columns of unit length are not plain: rounded, their lengths differ by 1e-3, which would decide the order.
    """
    as_stored = space.normalized or space.metric != "cosine"
    return (
        as_stored
        and isinstance(vectors, np.ndarray)
        and vectors.dtype == np.float32
        and vectors.flags.c_contiguous
        and vectors.flags.aligned
    )


def prepared(vectors: Stored, space: Space) -> Vectors:
    """`vectors` (rows, dimension) as FAISS is to rank them: float32, C-contiguous, of unit length where cosine."""
    if space.metric == "cosine":
        return np.ascontiguousarray(unit(vectors))
    return np.ascontiguousarray(vectors, dtype=np.float32)


def faiss_metric(metric: Metric) -> int:
    """FAISS's number for the metric over prepared vectors."""
    number: int = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
    return number


def rough_metric(space: Space) -> int:
    """FAISS's number for the metric by which an index compares rounded vectors (codes); not always the space's own.

    Vectors of unit length have the same order by distance and by inner product. By distance rounding harms less, because
    near rows have small sums: with the same number of candidates from four-bit codes, recall of the ten nearest under
    cosine was 0.999 by distance and 0.89 by inner product.
    """
    by_distance: int = faiss.METRIC_L2
    return by_distance if space.normalized or space.metric == "cosine" else faiss_metric(space.metric)


def check_request(queries: Vectors, k: int, selected: Selected | None, shape: tuple[int, ...]) -> None:
    """Refuse what would make FAISS read beyond the end of an array: it takes bare pointers.

    Raises:
        ValueError: the queries or the selection do not fit a column of this shape, or k is below 1.
    """
    rows, dimension = shape
    if queries.ndim != 2 or queries.shape[1] != dimension or queries.dtype != np.float32:
        raise ValueError(f"queries must be (n, {dimension}) float32, not {queries.shape} {queries.dtype}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if selected is not None and (selected.mask.shape != (rows,) or selected.mask.dtype != np.bool_):
        raise ValueError(f"selected must be ({rows},) bool, not {selected.mask.shape} {selected.mask.dtype}")


def search(
    queries: Vectors,
    vectors: Vectors,
    k: int,
    metric: Metric,
    selected: Selected | None = None,
    longest: float | None = None,
) -> Found:
    """The `k` best of `vectors`, exactly, whatever else is in the batch.

    Args:
        queries: (queries, dimension) float32; of unit length where the metric is cosine.
        vectors: (rows, dimension), as `prepared` gives them or `is_plain` allows them; read where they lie.
        k: how many rows, at least 1.
        metric: decides the score.
        selected: the rows that may be found. None means all.
        longest: the length of the longest vector, where it is known.
    """
    if not len(queries) or not len(vectors):
        return nothing(len(queries), k, metric)
    queries = np.ascontiguousarray(queries)
    sparse = selected is not None and selected.count * SPARSE < len(vectors)
    if len(queries) < PRODUCT_QUERIES and not sparse:
        return _one_by_one(queries, vectors, k, metric, selected)
    if selected is None:
        return _together(queries, vectors, k, metric, length(vectors) if longest is None else longest)
    return _over_blocks(queries, k, metric, selected.rows, lambda rows: vectors[rows])


def search_column(queries: Vectors, column: Stored | Stack, k: int, space: Space, selected: Selected | None) -> Found:
    """Exact search of the selected rows of a column of any kind, without a copy of the whole of it.

    Args:
        queries: (queries, dimension) float32; of unit length where the metric is cosine.
        column: (rows, dimension) float32 or float16.
        k: how many rows.
        space: decides the score.
        selected: the rows that may be found. None means all.
    """
    if is_plain(column, space):
        return search(queries, column, k, space.metric, selected)
    chosen = np.arange(len(column)) if selected is None else selected.rows
    return _over_blocks(queries, k, space.metric, chosen, lambda rows: prepared(taken(column, rows), space))


def ranked(queries: Vectors, rows: Rows, column: Stored | Stack, space: Space, k: int) -> Found:
    """The `k` best of the rows (queries, candidates) that a search found, with their exact scores; -1 is no row."""
    return Found(*cut(scores_of(queries, rows, column, space), rows, space.metric, k))


def scores_of(queries: Vectors, rows: Rows, column: Stored | Stack, space: Space) -> Vectors:
    """The exact scores of rows (queries, candidates) of a column; the worst for -1.

    Raises:
        Damaged: the column has no such row.
    """
    if rows.size and rows.max() >= len(column):  # FAISS would read there, wherever that is
        raise errors.Damaged(
            f"an index leads to row {rows.max()}, and its column has {len(column)}: it is damaged, so run "
            "`forwardfill verify --repair`"
        )
    if is_plain(column, space):
        return score_rows(queries, column, rows, space.metric)
    vectors = taken(column, np.maximum(rows, 0))  # (queries, candidates, dimension)
    scores = score(queries, vectors, space.metric, as_stored=space.normalized and column.dtype == np.float32)
    scores[rows < 0] = worst(space.metric)
    return scores


def taken(column: Stored | Stack, rows: Rows) -> Stored:
    """The rows (..., dimension) at positions (...), copied."""
    return column.take(rows) if isinstance(column, Stack) else column[rows]


def length(vectors: Vectors) -> float:
    """The length of the longest of (rows, dimension) float32 vectors."""
    squares = np.empty(len(vectors), np.float32)
    faiss.fvec_norms_L2sqr(faiss.swig_ptr(squares), faiss.swig_ptr(vectors), vectors.shape[1], len(vectors))
    return float(np.sqrt(squares.max(initial=0)))


def nothing(queries: int, k: int, metric: Metric) -> Found:
    """The answer where there is no row to give."""
    none = np.full((queries, k), -1, np.int64)
    return Found(np.full((queries, k), worst(metric), np.float32), none)


def _one_by_one(queries: Vectors, vectors: Vectors, k: int, metric: Metric, selected: Selected | None) -> Found:
    """Compare each query with each row by FAISS's function for one pair, whose scores are exact: none is computed again.

    `SLACK` more rows than wanted are asked for because of equal scores: the smaller row must come first, and FAISS keeps any.
    Where still more rows score as the last of them does, as vectors of one bit for each number do, every row is scored again.
    """
    pool = min(k + SLACK, len(vectors))
    scores, rows = knn(queries, vectors, pool, metric, selected)
    if metric == "euclidean":
        scores = np.sqrt(scores)
    if selected is not None:
        scores[rows < 0] = worst(metric)  # FAISS has fillers of its own
    found = Found(*head(scores, rows, metric, k))
    if pool < len(vectors):
        for at in np.flatnonzero((scores[:, k - 1] == scores[:, -1]) & (rows[:, -1] >= 0)):
            last = found.scores[at, -1]
            found.scores[at], found.rows[at] = _first_of_equals(
                queries[at : at + 1], vectors, k, metric, selected, last
            )
    return found


def _first_of_equals(
    query: Vectors, vectors: Vectors, k: int, metric: Metric, selected: Selected | None, last: np.float32
) -> tuple[Vectors, Rows]:
    """The `k` best rows for a query (1, dimension), the last of which scores `last`: of all that do, the smallest are taken."""
    rows = np.arange(len(vectors)) if selected is None else selected.rows
    scores = score_rows(query, vectors, rows[None], metric)[0]
    better = np.flatnonzero(scores < last if metric == "euclidean" else scores > last)
    chosen = np.concatenate([better, np.flatnonzero(scores == last)[:k]])
    return cut(scores[chosen][None], rows[chosen][None], metric, k)


def _together(queries: Vectors, vectors: Vectors, k: int, metric: Metric, longest: float) -> Found:
    """Compare all queries by one matrix product; those for which its rounding may have hidden a row are asked one by one."""
    pool = min(k + SLACK, len(vectors))
    products, rows = _knn(queries, vectors, pool, metric, None)
    found = Found(*cut(score_rows(queries, vectors, rows, metric), rows, metric, k))
    if pool < len(vectors):
        doubtful = np.flatnonzero(~beyond_doubt(found.scores[:, -1], products, queries, longest, metric))
        if len(doubtful):
            found.scores[doubtful], found.rows[doubtful] = _one_by_one(queries[doubtful], vectors, k, metric, None)
    return found


def beyond_doubt(
    last: Vectors, products: Vectors, queries: Vectors, longest: float, metric: Metric
) -> NDArray[np.bool_]:
    """For which queries it is certain that no row outside the proposed ones is as good as the last that was found.

    A row that was not proposed scores no better than the worst proposed one, except for rounding: a sum of d products of
    float32 is off by at most d 2^-24 |x||y|, and a squared distance by d 2^-24 (|x| + |y|)^2. The gap must be three times
    that, because then `_one_by_one`, which rounds too, gives the same rows.
    """
    lengths = np.sqrt(np.einsum("qd,qd->q", queries, queries, dtype=np.float64))
    terms = queries.shape[1] + 8
    if metric == "euclidean":
        gap, most = products.max(axis=1) - last.astype(np.float64) ** 2, (lengths + longest) ** 2
    else:
        gap, most = last - products.min(axis=1).astype(np.float64), lengths * longest
    return np.asarray(gap > 3 * terms * (2.0**-24 * most + 2.0**-126))


def _over_blocks(
    queries: Vectors, k: int, metric: Metric, chosen: NDArray[np.intp], take: Callable[[NDArray[np.intp]], Vectors]
) -> Found:
    """Search the chosen rows a block at a time; `take` gives their vectors, prepared."""
    best = nothing(len(queries), k, metric)
    for start in range(0, len(chosen), BLOCK):
        block = chosen[start : start + BLOCK]
        found = search(queries, take(block), min(k, len(block)), metric)
        rows = np.where(found.rows < 0, -1, block[found.rows])
        scores = np.hstack([best.scores, found.scores])
        best = Found(*cut(scores, np.hstack([best.rows, rows]), metric, k))
    return best


def knn(queries: Vectors, vectors: Vectors, k: int, metric: Metric, selected: Selected | None = None) -> Found:
    """The `k` best rows, compared one by one; any of those with equal scores. Squared distances for euclidean."""
    return Found(*_knn(queries, vectors, k, metric, ONE_BY_ONE if selected is None else selected.selector))


def _knn(queries: Vectors, vectors: Vectors, pool: int, metric: Metric, selector: Any) -> tuple[Vectors, Rows]:
    """FAISS's scores (squared distances for euclidean) and rows (queries, pool), -1 where fewer are selected."""
    scores, rows = np.empty((len(queries), pool), np.float32), np.empty((len(queries), pool), np.int64)
    x, y, dis, ids = (faiss.swig_ptr(array) for array in (queries, vectors, scores, rows))
    sizes: tuple[Any, ...] = (vectors.shape[1], len(queries), len(vectors), pool)
    if metric == "euclidean":
        faiss.knn_L2sqr(x, y, *sizes, dis, ids, None, selector)
    else:
        faiss.knn_inner_product(x, y, *sizes, dis, ids, selector)
    return scores, rows
