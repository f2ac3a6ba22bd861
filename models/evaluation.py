"""Retrieval quality: CMC, mAP and neighbour recall, exact and blockwise. The one evaluation of this project.

The protocol is that of FCT and its followers (CVPR 2022): query set and gallery are the same items, each
query's own item is left out, relevant is what has the query's label. Average precision is scikit-learn's: items with
equal scores are handled jointly. CMC breaks ties by gallery order. Queries without a relevant item are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Metric = Literal["euclidean", "cosine", "inner_product"]
METRICS: tuple[Metric, ...] = ("euclidean", "cosine", "inner_product")

Array = npt.NDArray[Any]

BLOCK_SCORES = 8_000_000  # scores held at once: 64 MB in float64


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How well a query model finds what belongs to its queries in a gallery. All NaN where no query was counted."""

    #: the share of queries with a relevant item among the first one, and among the first five
    cmc1: float
    cmc5: float
    #: mean average precision
    map: float
    #: queries that have a relevant item
    queries: int


def evaluate_retrieval(
    queries: Array,
    gallery: Array,
    query_labels: Array,
    gallery_labels: Array,
    *,
    metric: Metric = "euclidean",
    leave_one_out: bool = False,
) -> Retrieval:
    """Search a gallery exhaustively with labelled queries.

    Args:
        queries: (n_queries, d), any float type.
        gallery: (n, d).
        query_labels: (n_queries,).
        gallery_labels: (n,).
        metric: how vectors are compared.
        leave_one_out: query i is gallery item i, and is left out of its own ranking.

    Raises:
        ValueError: shapes do not fit, a value is not finite, or the metric is unknown.
    """
    return mean_retrieval(
        judge_queries(queries, gallery, query_labels, gallery_labels, metric=metric, leave_one_out=leave_one_out)
    )


def cross_test(queries: Array, gallery: Array, labels: Array, *, metric: Metric = "euclidean") -> Retrieval:
    """Evaluate the paper's protocol: the same items embedded twice, row by row, each left out of its own ranking."""
    return evaluate_retrieval(queries, gallery, labels, labels, metric=metric, leave_one_out=True)


def judge_queries(
    queries: Array,
    gallery: Array,
    query_labels: Array,
    gallery_labels: Array,
    *,
    metric: Metric = "euclidean",
    leave_one_out: bool = False,
) -> npt.NDArray[np.float64]:
    """Search a gallery exhaustively as `evaluate_retrieval` does, and judge each query by itself.

    Returns:
        (n_queries, 2), see `ranks_and_precisions`.
    """
    query_labels, gallery_labels = np.asarray(query_labels), np.asarray(gallery_labels)
    if len(query_labels) != len(queries) or len(gallery_labels) != len(gallery):
        raise ValueError(
            f"{len(queries)} queries with {len(query_labels)} labels, {len(gallery)} items with {len(gallery_labels)}"
        )
    _check_own(queries, gallery, leave_one_out)
    blocks = score_blocks(queries, gallery, metric=metric, leave_one_out=leave_one_out)
    judged = [
        ranks_and_precisions(scores, query_labels[start : start + len(scores)], gallery_labels)
        for start, scores in blocks
    ]
    return np.concatenate([np.empty((0, 2)), *judged])


def mean_retrieval(judged: Array) -> Retrieval:
    """Take the mean over the queries that have something to find.

    Args:
        judged: (n_queries, 2), see `ranks_and_precisions`.
    """
    first, precisions = judged[~np.isnan(judged[:, 0])].T
    if not len(first):
        return Retrieval(np.nan, np.nan, np.nan, 0)
    return Retrieval(float((first < 1).mean()), float((first < 5).mean()), float(precisions.mean()), len(first))


def neighbour_recall(
    queries: Array,
    gallery: Array,
    reference: Array,
    *,
    metric: Metric = "euclidean",
    k: int = 10,
    leave_one_out: bool = False,
) -> float:
    """Return the share of the k neighbours in the reference gallery that are among the k neighbours in the gallery.

    Args:
        queries: (n_queries, d).
        gallery: (n, d), for instance transformed embeddings.
        reference: (n, d), the same items as they should be, for instance native embeddings.
        metric: how vectors are compared.
        k: neighbours; fewer where the gallery has fewer.
        leave_one_out: query i is item i, and no neighbour of itself.

    Returns:
        Recall@k in [0, 1]; NaN where there is no neighbour at all.
    """
    k = min(k, len(gallery) - leave_one_out)
    if k < 1 or not len(queries):
        return float("nan")
    _check_own(queries, gallery, leave_one_out)
    shared = 0
    blocks = (score_blocks(queries, each, metric=metric, leave_one_out=leave_one_out) for each in (gallery, reference))
    for (_, found), (_, wanted) in zip(*blocks, strict=True):
        shared += int(shared_neighbours(found, top(wanted, k)).sum())
    return shared / (k * len(queries))


def evaluate_pairs(
    predicted: Array, target: Array, labels: Array | None = None, *, metric: Metric = "euclidean", k: int = 10
) -> dict[str, float | None]:
    """Judge transformed embeddings by the native ones of the same items.

    Queries are the native vectors, the gallery is the transformed ones, each item is left out of its own ranking.

    Args:
        predicted: (n, d) transformed embeddings.
        target: (n, d) native embeddings of the same items.
        labels: (n,), or None where there are none.
        metric: that of the target model.
        k: neighbours of `neighbour_recall`.

    Returns:
        `mean_cosine`, `mean_squared_error`, `neighbour_recall`, and with labels `cmc1`, `cmc5`, `map`. None stands for
        a measure that these pairs do not define: a single pair has no neighbour, a label that occurs once leaves nothing to
        find, and transformed embeddings that overflowed cannot be judged.

    Raises:
        ValueError: no pair at all, shapes that differ, a native value that is not finite, or an unknown metric.
    """
    if predicted.shape != target.shape or predicted.ndim != 2 or not len(predicted):
        raise ValueError(f"pairs must have one shape (n, d) with n > 0, not {predicted.shape} and {target.shape}")
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    _check_finite(target=target)
    if not np.isfinite(predicted).all():
        names = ("mean_cosine", "mean_squared_error", "neighbour_recall", "cmc1", "cmc5", "map")
        return dict.fromkeys(names[: 3 if labels is None else 6])
    values = {
        "mean_cosine": float((_unit(predicted) * _unit(target)).sum(axis=1).mean()),
        "mean_squared_error": float(np.square(predicted - target).mean()),
        "neighbour_recall": neighbour_recall(target, predicted, target, metric=metric, k=k, leave_one_out=True),
    }
    if labels is not None:
        found = cross_test(target, predicted, labels, metric=metric)
        values |= {"cmc1": found.cmc1, "cmc5": found.cmc5, "map": found.map}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def score_blocks(
    queries: Array,
    gallery: Array,
    *,
    metric: Metric = "euclidean",
    leave_one_out: bool = False,
    origin: Array | None = None,
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Score a gallery for queries, exactly, a block of queries at a time.

    Computed in float64 and rounded to float32, so that equal vectors have equal scores wherever they stand. Euclidean
    scores are -|q - g|^2 / 2 + |q - origin|^2 / 2: the second part is the same for all items, so the order is that of
    -|q - g|^2.

    Args:
        queries: (n_queries, d), any float type.
        gallery: (n, d).
        metric: how vectors are compared.
        leave_one_out: query i is gallery item i; there may be more items than queries.
        origin: (d,), see `centre_of`; None: the gallery's. Euclidean scores against two galleries can only be compared if
            both have the same origin.

    Yields:
        The block's first query, and its scores (block, n): larger is better, the own item at -infinity.

    Raises:
        ValueError: shapes do not fit, a value is not finite, or the metric is unknown.
    """
    if metric not in METRICS:
        raise ValueError(f"the metric {metric!r} is not one of {', '.join(METRICS)}")
    queries, gallery = np.asarray(queries, np.float64), np.asarray(gallery, np.float64)
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries {queries.shape} and gallery {gallery.shape} must be (n, d) of one width d")
    _check_finite(queries=queries, gallery=gallery)
    if leave_one_out and len(queries) > len(gallery):
        raise ValueError(f"{len(queries)} queries cannot each be one of {len(gallery)} items")
    if metric == "cosine":
        queries, gallery = _unit(queries), _unit(gallery)
    if metric == "euclidean" and len(gallery):
        origin = centre_of(gallery) if origin is None else origin
        queries, gallery = queries - origin, gallery - origin
    half_squares = np.square(gallery).sum(axis=1) / 2
    block = max(1, BLOCK_SCORES // max(1, len(gallery)))
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ gallery.T
        if metric == "euclidean":
            scores -= half_squares  # (2 q.g - |g|^2 - |q|^2) / 2 without the query's own part
        rounded = scores.astype(np.float32)
        if leave_one_out:
            rows = np.arange(len(rounded))
            rounded[rows, start + rows] = -np.inf
        yield start, rounded


def centre_of(vectors: Array) -> npt.NDArray[np.float64]:
    """Return the point (d,) to measure from, so that what all vectors (n, d) have in common costs a score no precision.

    It is their mean, rounded to float32. That is near enough; and with so few digits, differences and products in float64
    stay exact, and equal distances stay equal.
    """
    mean = np.asarray(vectors, np.float64).mean(axis=0)
    return np.asarray(mean.astype(np.float32), np.float64)


def ranks_and_precisions(scores: Array, query_labels: Array, gallery_labels: Array) -> npt.NDArray[np.float64]:
    """Judge each query by itself, for a paired comparison of two searches: `evaluate_retrieval` is the mean of this.

    Args:
        scores: (n_queries, n), what is left out at -infinity.
        query_labels: (n_queries,).
        gallery_labels: (n,).

    Returns:
        (n_queries, 2): the place of the first relevant item, counted from 0, and the average precision; NaN where there
        is nothing to find.
    """
    judged = np.full((len(scores), 2), np.nan)
    for place, (row, label) in enumerate(zip(scores, query_labels, strict=True)):
        relevant = np.flatnonzero((gallery_labels == label) & (row > -np.inf))
        if len(relevant):
            judged[place] = _first_rank(row, relevant), _average_precision(row, relevant)
    return judged


def shared_neighbours(scores: Array, wanted: Array) -> npt.NDArray[np.int64]:
    """Count, for each query, those of its k wanted neighbours that are among its k best.

    Args:
        scores: (n_queries, n).
        wanted: (n_queries, k) places in the gallery.

    Returns:
        (n_queries,).
    """
    chosen = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(chosen, top(scores, wanted.shape[1]), values=True, axis=1)
    return np.asarray(np.take_along_axis(chosen, wanted, axis=1).sum(axis=1), np.int64)


def shared_by_depth(scores: Array, wanted: Array) -> npt.NDArray[np.int64]:
    """Count, for each query and each depth d from 1 to k, those of its d first wanted neighbours that are among its d best.

    Args:
        scores: (n_queries, n).
        wanted: (n_queries, k) places in the gallery, the nearest first.

    Returns:
        (n_queries, k).
    """
    places = np.arange(wanted.shape[1])
    same = ranked(scores, len(places))[:, :, None] == wanted[:, None, :]
    needed = np.maximum.outer(places, places)  # the depth, less one, from which on such a match counts
    return np.stack([same[:, needed == depth].sum(axis=1) for depth in places], axis=1).cumsum(axis=1)


def ranked(scores: Array, k: int) -> npt.NDArray[np.int64]:
    """Return the places of the k best scores of each row, (n_queries, k), the best first."""
    chosen = top(scores, k)
    order = np.argsort(-np.take_along_axis(scores, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def top(scores: Array, k: int) -> npt.NDArray[np.int64]:
    """Return the places of the k best scores of each row, (n_queries, k), in no order."""
    return np.argpartition(-scores, k - 1, axis=1)[:, :k]


def ranked_relevance(
    ranked: Sequence[Sequence[str]],
    query_labels: Sequence[int],
    labels: Mapping[str, int],
    *,
    own: Sequence[str] | None = None,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Turn ranked lists of ids, as a search service answers them, into what the functions below take.

    Args:
        ranked: per query the ids found, best first; lists may differ in length.
        query_labels: per query its label.
        labels: the label of every gallery item.
        own: per query the id of its own item, which is left out.

    Returns:
        relevance (n_queries, longest list) in rank order, False past a list's end, and the number of relevant items
        (n_queries,) in the whole gallery, found or not.

    Raises:
        KeyError: an id that no label is known for.
    """
    owners: Sequence[str | None] = own if own is not None else [None] * len(ranked)
    rows = [
        [labels[found] == label for found in ids if found != mine]
        for ids, label, mine in zip(ranked, query_labels, owners, strict=True)
    ]
    relevance = np.zeros((len(rows), max(map(len, rows), default=0)), np.bool_)
    for row, hits in zip(relevance, rows, strict=True):
        row[: len(hits)] = hits
    sizes = dict(zip(*np.unique(np.array(list(labels.values())), return_counts=True), strict=True))
    total = [
        int(sizes.get(label, 0)) - (mine is not None and labels.get(mine) == label)
        for label, mine in zip(query_labels, owners, strict=True)
    ]
    return relevance, np.array(total, np.int64)


def cmc_from_ranking(relevance: Array, total_relevant: Array, *, k: int = 1) -> float:
    """Return the share of queries with a relevant item among their first k.

    Args:
        relevance: (n_queries, n) bool in rank order, own item left out.
        total_relevant: (n_queries,) relevant items in the gallery; queries with none are not counted.
        k: ranks looked at.
    """
    counted = np.asarray(total_relevant) > 0
    return float(relevance[counted, :k].any(axis=1).mean()) if counted.any() else float("nan")


def map_from_ranking(relevance: Array, total_relevant: Array) -> float:
    """Return the mean average precision of ranked lists; what a cut-off list did not find counts as never found.

    Args:
        relevance: (n_queries, n) bool in rank order, own item left out.
        total_relevant: (n_queries,) relevant items in the gallery; queries with none are not counted.
    """
    counted = np.asarray(total_relevant) > 0
    if not counted.any():
        return float("nan")
    hits = np.asarray(relevance, np.float64)[counted]
    precision = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
    return float(((precision * hits).sum(axis=1) / np.asarray(total_relevant)[counted]).mean())


def fraction_closed(before: float, after: float, best: float) -> float:
    """Return how much of the distance from `before` to `best` is closed by `after`: 0 nothing, 1 everything."""
    return (after - before) / (best - before)


def _check_finite(**columns: Array) -> None:
    """Refuse vectors that have no score: they would be left out, and the rest would be judged as if it were all."""
    for name, vectors in columns.items():
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{name}: a NaN or an infinity, first in row {int(finite.argmin())}; drop such rows from all"
            )


def _check_own(queries: Array, gallery: Array, leave_one_out: bool) -> None:
    """Refuse queries that are not as many as the items: nobody would notice that the mean is over some items only."""
    if leave_one_out and len(queries) != len(gallery):
        raise ValueError(f"leaving each item out needs as many queries ({len(queries)}) as items ({len(gallery)})")


def _first_rank(scores: Array, relevant: Array) -> int:
    """Count the items ranked before the best relevant one, ties in gallery order."""
    best = relevant[scores[relevant].argmax()]
    return int((scores > scores[best]).sum() + (scores[:best] == scores[best]).sum())


def _average_precision(scores: Array, relevant: Array) -> float:
    """Average over relevant items of the precision at their score: as scikit-learn, without its sort by index.

    Precision at score s is (relevant items scoring at least s) / (items scoring at least s). Sorting values alone is
    several times faster than sorting indices, and searching them gives both counts.
    """
    ascending, hits = np.sort(scores), np.sort(scores[relevant])
    found = len(hits) - np.searchsorted(hits, hits, side="left")
    ranked = len(ascending) - np.searchsorted(ascending, hits, side="left")
    return float((found / ranked).mean())


def _unit(vectors: Array) -> Array:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)
