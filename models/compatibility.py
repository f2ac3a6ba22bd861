"""Is an upgrade compatible, what does it gain, and whom does it cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.evaluation import Array, fraction_closed

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One metric of the four configurations, query model / gallery model, without which a number of an upgrade says little.

    All four are of the same queries and items, and none is NaN.
    """

    #: nothing is done
    old_old: float
    #: the new model's queries go to the old vectors as they are
    naive: float
    #: the new model's queries and the old vectors, by whatever route the method offers
    adapted: float
    #: everything is re-embedded, by a new model that was trained without regard to the old one
    new_new: float

    @property
    def compatible(self) -> bool:
        """BCT's empirical criterion: the upgrade beats staying. A tie does not.

        It is the adapters' break-even too: `retention * reindex_gain > 1` says the same.
        """
        return self.adapted > self.old_old

    @property
    def update_gain(self) -> float:
        """BCT's: how much of what the new model is better by arrives without re-embedding."""
        return fraction_closed(self.old_old, self.adapted, self.new_new)

    @property
    def retention(self) -> float:
        """The adapters' recall ratio (ARR): how much of a full re-index is kept."""
        return self.adapted / self.new_new

    @property
    def reindex_gain(self) -> float:
        """What a full re-index is worth, as a factor. The literature of adapters calls it upgrade gain."""
        return self.new_new / self.old_old


@dataclass(frozen=True, slots=True)
class Flips:
    """Queries whose success changes with an upgrade. A rising mean can hide many that fell. NaN where none is counted."""

    #: the share that failed before and succeeds now (PFR)
    positive: float
    #: the share that succeeded before and fails now (NFR)
    negative: float
    #: queries that have something to find
    queries: int

    @property
    def gain(self) -> float:
        """What the share of successes rises by."""
        return self.positive - self.negative


def compatibility_matrix(versions: int, measure: Callable[[int, int], float]) -> Matrix:
    """Measure each model version's queries against its own gallery and those of all versions before.

    Args:
        versions: T, oldest first.
        measure: the metric, from the places of the query's and of the gallery's version.

    Returns:
        (T, T): row t is the query's version, column k the gallery's; zero where k > t, which is never asked.
    """
    matrix = np.zeros((versions, versions))
    for query, gallery in zip(*np.tril_indices(versions), strict=True):
        matrix[query, gallery] = measure(int(query), int(gallery))
    return matrix


def average_compatibility(matrix: Array) -> float:
    """Return AC: the share of pairs (t, k), t after k, whose C[t, k] exceeds C[k, k].

    A tie is incompatible, as in HOC's code; CoReS' code takes it for compatible.

    Args:
        matrix: (T, T) of `compatibility_matrix`, T at least 2.
    """
    matrix = _square(matrix, versions=2)
    later, earlier = np.tril_indices(len(matrix), -1)
    return float((matrix[later, earlier] > matrix[earlier, earlier]).mean())


def average_accuracy(matrix: Array) -> float:
    """Return AM: the mean of the lower triangle and its diagonal.

    A pair that finds nothing at all counts with its zero. The reference codes take the mean of what is not zero, so that
    the worst pair possible raises their figure.

    Args:
        matrix: (T, T) of `compatibility_matrix`.
    """
    matrix = _square(matrix, versions=1)
    return float(matrix[np.tril_indices(len(matrix))].mean())


def flips(before: Array, after: Array, *, k: int = 1) -> Flips:
    """Compare two systems query by query: success is a relevant item among the first k.

    Args:
        before: (n_queries,) the place of the first relevant item, counted from 0; NaN where there is nothing to find. The
            first column of `models.evaluation.judge_queries`.
        after: (n_queries,) the same queries under the other system.
        k: places looked at.

    Raises:
        ValueError: not the same queries.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.ndim != 1 or before.shape != after.shape or (np.isnan(before) != np.isnan(after)).any():
        raise ValueError(
            f"places of shapes {before.shape} and {after.shape} must be of the same queries: one each, "
            "NaN where neither system has anything to find"
        )
    counted = ~np.isnan(before)
    if not counted.any():
        return Flips(np.nan, np.nan, 0)
    succeeded, succeeds = before[counted] < k, after[counted] < k
    return Flips(
        float((~succeeded & succeeds).mean()), float((succeeded & ~succeeds).mean()), int(np.count_nonzero(counted))
    )


def _square(matrix: Array, *, versions: int) -> Matrix:
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < versions:
        raise ValueError(f"a matrix of at least {versions} versions must be square, not {matrix.shape}")
    return matrix
