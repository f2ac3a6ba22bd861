"""The best of what several segments found. Pure: no input, no output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gallery.arrays import Metric, Rows, Vectors


class Part(NamedTuple):
    """What was found in some segments, for the same queries."""

    #: (queries, n) float32
    scores: Vectors
    #: (queries, n) int64: position of the segment in the snapshot
    segments: Rows
    #: (queries, n) int64; -1 where nothing was found
    rows: Rows


def merge(parts: Sequence[Part], k: int, metric: Metric, queries: int) -> Part:
    """The `k` best over all parts, best first; equal scores in the order of segments and rows, so answers repeat.

    Every row of a snapshot is in exactly one segment and every segment in exactly one part, so nothing can be found twice.
    """
    if not parts:
        return Part(
            np.empty((queries, 0), np.float32), np.empty((queries, 0), np.int64), np.empty((queries, 0), np.int64)
        )
    scores, segments, rows = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    cost = scores.copy() if metric == "euclidean" else -scores
    cost[rows < 0] = np.inf
    if queries == 1:  # NumPy takes a quarter of the time for a line that is an array of its own
        best = np.lexsort((rows[0], segments[0], cost[0]))[:k]
        taken = Part(scores[0][best][None], segments[0][best][None], rows[0][best][None])
    else:
        order, lines = np.lexsort((rows, segments, cost), axis=1)[:, :k], np.arange(queries)[:, None]
        taken = Part(scores[lines, order], segments[lines, order], rows[lines, order])
    taken.segments[taken.rows < 0] = -1
    return taken


def single(segment: int, scores: Vectors, rows: Rows) -> Part:
    """What one segment found."""
    return Part(scores, np.full(rows.shape, segment, dtype=np.int64), rows)
