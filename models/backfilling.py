"""Partial backfilling (FastFill, ICLR 2023): which items are re-embedded first, and
how good a gallery is while it holds native vectors of some items and derived vectors of the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.evaluation import Array, Metric, Retrieval, centre_of, mean_retrieval, ranks_and_precisions, score_blocks

Order = npt.NDArray[np.int64]

#: 0 %, 100 % and twenty in between, as in the authors' code
POINTS = 22


@dataclass(frozen=True, slots=True)
class BackfillingCurve:
    """How retrieval rises while a gallery is re-embedded in some order."""

    #: (points,) the share of items that are native, from 0 to 1
    fractions: npt.NDArray[np.float64]
    #: one for each fraction
    retrievals: tuple[Retrieval, ...]

    @property
    def area(self) -> Retrieval:
        """The plain mean over the points, as the authors' code has it: not the trapezoidal rule."""
        values = np.array([(each.cmc1, each.cmc5, each.map) for each in self.retrievals]).mean(axis=0)
        cmc1, cmc5, precision = map(float, values)
        return Retrieval(cmc1, cmc5, precision, self.retrievals[0].queries)


def backfilling_curve(
    queries: Array,
    derived: Array,
    native: Array,
    labels: Array,
    order: Array,
    *,
    points: int = POINTS,
    metric: Metric = "euclidean",
    sample: int | None = None,
) -> BackfillingCurve:
    """Search a gallery with new-model queries while it is re-embedded item by item.

    At point i of `points` the first i * n // (points - 1) items of the order are native, the others derived. Each query's
    own item is left out of its ranking, native or derived. A query's scores against both galleries are computed once; each
    point only chooses, for each item, which of the two scores counts.

    Args:
        queries: (n, d) new-model vectors of the gallery's items, row by row: most often `native` itself.
        derived: (n, d) h(old) of the same items.
        native: (n, d) new-model vectors of the same items, as they are stored.
        labels: (n,).
        order: (n,) places in the gallery, in the order of re-embedding; the functions below make such orders.
        points: of the curve.
        metric: how vectors are compared.
        sample: evaluate only this many queries, evenly spaced; the gallery is always whole.

    Raises:
        ValueError: shapes do not fit, the order is not a permutation, or there are fewer than two points or a query.
    """
    labels = np.asarray(labels)
    size = len(labels)
    if not size == len(queries) == len(derived) == len(native):
        raise ValueError(
            f"{len(queries)} queries, {len(derived)} derived, {len(native)} native vectors and {size} labels: "
            "row i must be the same item in all"
        )
    turn = _turns(order, size)
    if points < 2 or not 1 <= (size if sample is None else sample) <= size:
        raise ValueError(f"a curve needs 2 points and 1 to {size} queries, not {points} and {sample}")
    own = np.arange(size) if sample is None else np.arange(sample) * size // sample
    cuts = np.arange(points) * size // (points - 1)
    judged = np.empty((points, len(own), 2))
    asking, origin = np.asarray(queries)[own], centre_of(native)  # one origin for both: a ranking mixes their scores
    blocks = (score_blocks(asking, each, metric=metric, origin=origin) for each in (native, derived))
    for (start, to_native), (_, to_derived) in zip(*blocks, strict=True):
        asked = slice(start, start + len(to_native))
        for scores in (to_native, to_derived):
            scores[np.arange(len(scores)), own[asked]] = -np.inf
        for point, cut in enumerate(cuts):
            mixed = np.where(turn < cut, to_native, to_derived)
            judged[point, asked] = ranks_and_precisions(mixed, labels[own[asked]], labels)
    return BackfillingCurve(cuts / size, tuple(map(mean_retrieval, judged)))


def random_order(size: int, *, seed: int = 0) -> Order:
    """Return a random order, with which every other one is compared."""
    return np.random.default_rng(seed).permutation(size)


def uncertainty_order(log_variance: Array) -> Order:
    """Order by predicted log-variance (n,), the least certain first (FastFill). Equal ones keep the gallery's order."""
    return _descending(log_variance)


def distance_order(derived: Array, native: Array, *, metric: Metric = "euclidean") -> Order:
    """Order by the true distance of derived (n, d) to native vectors (n, d), the furthest first.

    An oracle: it needs the vectors that backfilling is to compute.
    """
    return _descending(_distances(derived, native, metric))


def class_mean_order(derived: Array, labels: Array) -> Order:
    """Order by the Euclidean distance of derived vectors (n, d) to the mean of their class, the furthest first.

    The order of lambda-orthogonality (NeurIPS 2025). It needs labels (n,), but no new vectors and no uncertainty head.
    """
    derived = np.asarray(derived, np.float64)
    _, place, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), derived.shape[1]))
    np.add.at(sums, place, derived)
    return _descending(_distances(derived, (sums / counts[:, None])[place], "euclidean"))


def _distances(one: Array, other: Array, metric: Metric) -> npt.NDArray[np.float64]:
    """Return each row's distance to its partner: 1 - cos under cosine, otherwise Euclidean."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.shape != other.shape:
        raise ValueError(f"vectors {one.shape} and {other.shape} must be of the same items in the same space")
    if metric != "cosine":
        return np.asarray(np.linalg.norm(one - other, axis=1))
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray(1 - (one * other).sum(axis=1) / np.where(lengths > 0, lengths, 1))


def _descending(values: Array) -> Order:
    values = np.asarray(values)
    if values.ndim != 1 or np.isnan(values).any():
        raise ValueError(f"an order needs one number per item and no NaN, not an array of shape {values.shape}")
    return np.argsort(-values.astype(np.float64), kind="stable")


def _turns(order: Array, size: int) -> Order:
    """Return each item's place in the order."""
    order = np.asarray(order)
    if order.shape != (size,) or not np.array_equal(np.sort(order), np.arange(size)):
        raise ValueError(f"the order must name each of the {size} items once")
    turn = np.empty(size, np.int64)
    turn[order] = np.arange(size)
    return turn
