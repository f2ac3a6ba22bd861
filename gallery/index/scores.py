"""The score of a query and a vector: one pure function, whichever index or route found the vector.

Two answers compare only if the same pair always has the same score. FAISS's matrix products sum in another order for one
query than for many, and lose small distances between long vectors (|x|^2 + |y|^2 - 2xy), so what they find is scored
again here, by FAISS's function for one pair: batching cannot change its order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gallery.arrays import Metric, Rows, Stored, Vectors
from gallery.index._library import faiss, one_thread

# How far from 1 the length of a float32 vector may be after division by its length: each number is off by 2^-24 of itself.
_ROUNDING = 2.0**-23


def score(queries: Vectors, vectors: Stored, metric: Metric, *, as_stored: bool = False) -> Vectors:
    """Exact scores, bit for bit the same for a pair whatever else is in the batch.

    Args:
        queries: (queries, dimension) float32; of unit length where the metric is cosine.
        vectors: (queries, candidates, dimension), for each query its own, or (candidates, dimension), shared by all;
            float32 or float16, of any length.
        metric: decides the score.
        as_stored: do not bring the vectors to unit length under cosine; they are near enough to it.

    Returns:
        (queries, candidates) float32: similarity for cosine and inner product, where a vector of zeros scores 0;
        Euclidean distance (not squared) for euclidean.
    """
    compared = unit(vectors) if metric == "cosine" and not as_stored else vectors
    flat = np.ascontiguousarray(compared, dtype=np.float32).reshape(-1, vectors.shape[-1])
    own = np.arange(len(flat)).reshape(vectors.shape[:-1])
    if vectors.ndim == 3:
        return score_rows(queries, flat, own, metric)
    scores = np.empty((len(queries), len(flat)), np.float32)
    for i in range(len(queries)):
        scores[i] = score_rows(queries[i : i + 1], flat, own[None], metric)[0]
    return scores


def score_rows(queries: Vectors, vectors: Vectors, rows: Rows, metric: Metric) -> Vectors:
    """The same scores, of chosen rows of vectors that are read where they lie.

    Args:
        queries: (queries, dimension) float32; of unit length where the metric is cosine.
        vectors: (rows, dimension) float32, C-contiguous; of unit length where the metric is cosine.
        rows: (queries, candidates) int64, for each query its own; the score of -1 is the worst.
        metric: decides the score.

    Returns:
        (queries, candidates) float32.
    """
    queries, rows = np.ascontiguousarray(queries), np.ascontiguousarray(rows)
    scores = np.empty(rows.shape, np.float32)
    if not rows.size:
        return scores
    by_distance = metric == "euclidean"
    function = faiss.fvec_L2sqr_by_idx if by_distance else faiss.fvec_inner_products_by_idx
    pointers = (faiss.swig_ptr(array) for array in (scores, queries, vectors, rows))
    if len(rows) == 1 and faiss.omp_get_max_threads() > 1:
        # FAISS starts its threads even for a single query, and waits for all of them. Where other processes have the cores,
        # that took 15 ms in place of 0.05 for one in a hundred queries with 128 candidates.
        with one_thread():
            function(*pointers, queries.shape[1], *rows.shape)
    else:
        function(*pointers, queries.shape[1], *rows.shape)
    return np.sqrt(scores, out=scores) if by_distance else scores


def worst(metric: Metric) -> float:
    """The score that stands where there is no row: no row scores worse."""
    return np.inf if metric == "euclidean" else -np.inf


def better_first_order(scores: Vectors, metric: Metric) -> NDArray[np.intp]:
    """The positions along the last axis of (..., candidates), best score first; equal scores stay in their order."""
    return np.argsort(scores if metric == "euclidean" else -scores, axis=-1, kind="stable")


def unit(vectors: Stored) -> Vectors:
    """`vectors` (..., dimension) as float32 of unit length; a vector of zeros, which has no direction, stays zeros.

    Its own results come back byte for byte, so a vector has one score however often it went through here.
    """
    single = vectors.astype(np.float32, copy=False)
    # In float64, because the square of 1e-25 is 0 in float32 and that of 1e25 infinite.
    lengths = np.sqrt(np.einsum("...d,...d->...", single, single, dtype=np.float64))[..., None]
    lengths[(lengths == 0) | (np.abs(lengths - 1) < _ROUNDING)] = 1
    scaled: Vectors = (single / lengths).astype(np.float32)
    return scaled


def cut(scores: Vectors, rows: Rows, metric: Metric, k: int) -> tuple[Vectors, Rows]:
    """The `k` best of each line, best first and among equals the smaller row first; padded to exactly `k`.

    Args:
        scores: (queries, candidates) float32; the worst where `rows` is -1.
        rows: (queries, candidates) int64; -1 where there is no row.
        metric: decides which end is best.
        k: how many columns come back.
    """
    key = scores if metric == "euclidean" else -scores
    if len(key) == 1:  # NumPy takes a quarter of the time for a line that is an array of its own
        order = _line_order(key[0], rows[0], k)
        best, best_rows = scores[0][order][None], rows[0][order][None]
    else:
        order, lines = np.lexsort((rows, key))[:, :k], np.arange(len(key))[:, None]
        best, best_rows = scores[lines, order], rows[lines, order]
    missing = k - best.shape[1]
    if missing > 0:
        best = np.pad(best, ((0, 0), (0, missing)), constant_values=worst(metric))
        best_rows = np.pad(best_rows, ((0, 0), (0, missing)), constant_values=-1)
    return best, best_rows


def _line_order(key: Vectors, rows: Rows, k: int) -> NDArray[np.intp]:
    """The positions of the `k` least, among equals those of the smaller rows; it sorts by rows only if there are equals."""
    order = key.argsort()[: k + 1]
    least = key[order].tolist()
    return (order if len(set(least)) == len(least) else np.lexsort((rows, key)))[:k]


def head(scores: Vectors, rows: Rows, metric: Metric, k: int) -> tuple[Vectors, Rows]:
    """What `cut` gives, but faster, for lines that are sorted except among equal scores, with missing rows at the end."""
    if scores.shape[1] >= k and in_order(scores[:, : k + 1], rows[:, :k], metric):
        return scores[:, :k], rows[:, :k]
    return cut(scores, rows, metric, k)


def in_order(scores: Vectors, rows: Rows, metric: Metric) -> bool:
    """Whether each score is better than the next, and no row is missing at the end: then there is nothing to sort.

    Args:
        scores: (queries, n or more) float32.
        rows: (queries, n) int64; what is missing is at the end.
        metric: decides which is better.
    """
    if rows[:, -1:].min(initial=0) < 0:
        return False
    first, second = scores[:, :-1], scores[:, 1:]
    return bool((first < second if metric == "euclidean" else first > second).all())
