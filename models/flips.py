"""Whom an upgrade costs: negative flips."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.evaluation import Array


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
