"""Fused scoring: an old companion vector and the upgraded space decide together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from models.evaluation import Array, score_blocks

#: what the weight is chosen from: 0 is staying, 1 is upgrading, both as cosine sees them
WEIGHTS = tuple(step / 10 for step in range(11))

Vectors = tuple[Array, Array]
Scores = npt.NDArray[np.float32]


def fused_blocks(
    upgraded: Vectors, old: Vectors, weights: tuple[float, ...]
) -> Iterator[tuple[int, dict[float, Scores]]]:
    """Score a gallery by weight * cos(upgraded query, upgraded item) + (1 - weight) * cos(old query, old item).

    Args:
        upgraded: queries (n_queries, d) and gallery (n, d) in one space, where one side of the two was transformed.
        old: the same queries and items as the old model sees them; query i is item i, and left out of its own ranking.
        weights: each in [0, 1].

    Yields:
        The block's first query, and for each weight its scores (block, n), the own item at -infinity.
    """
    blocks = (score_blocks(*each, metric="cosine", leave_one_out=True) for each in (upgraded, old))
    for (start, first), (_, second) in zip(*blocks, strict=True):
        yield start, {weight: _mix(first, second, weight) for weight in weights}


def _mix(first: Scores, second: Scores, weight: float) -> Scores:
    if weight in (0, 1):  # 0 * -infinity is not a number
        return first if weight else second
    return np.float32(weight) * first + np.float32(1 - weight) * second
