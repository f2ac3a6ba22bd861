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
    scores = np.concatenate([part.scores for part in parts], axis=1)
    segments = np.concatenate([part.segments for part in parts], axis=1)
    rows = np.concatenate([part.rows for part in parts], axis=1)
    cost = scores if metric == "euclidean" else -scores
    cost = np.where(rows < 0, np.inf, cost)
    best = np.lexsort((rows, segments, cost), axis=1)[:, :k]
    taken = Part(*(np.take_along_axis(array, best, axis=1) for array in (scores, segments, rows)))
    return taken._replace(segments=np.where(taken.rows < 0, -1, taken.segments))


def single(segment: int, scores: Vectors, rows: Rows) -> Part:
    """What one segment found."""
    return Part(scores, np.full(rows.shape, segment, dtype=np.int64), rows)
