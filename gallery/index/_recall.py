"""How much of the truth an approximate index finds, measured on the column's own rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gallery.arrays import Metric, Rows, Space, Stored, Vectors
from gallery.index import _exact
from gallery.index.base import Found, Index
from gallery.index.scores import better_first_order, worst

# Recall is that of the best ten.
K = 10
# How many rows are asked for their neighbours. Of 2,000 neighbours a recall of 0.98 is known to 0.003 or so.
ROWS = 200


class Sample(NamedTuple):
    """Some rows of a column as queries, with the score of the last of their true neighbours.

    Attributes:
        space: decides the score.
        queries: (queries, dimension) float32.
        own: (queries,) the row that each query is; it is no neighbour of itself.
        neighbours: how many each has: K, or as many as there are.
        last: (queries,) float32, the score of the last of them.
    """

    space: Space
    queries: Vectors
    own: Rows
    neighbours: int
    last: Vectors


def sample(vectors: Stored, space: Space) -> Sample:
    """Draw rows with a fixed seed, so that building again measures the same, and search them exactly."""
    total = len(vectors)
    own = np.sort(np.random.default_rng(2).choice(total, min(ROWS, total), replace=False)).astype(np.int64)
    queries = _exact.prepared(vectors[own], space)
    found = _exact.search_column(queries, vectors, K + 1, space, None)
    neighbours = min(K, total - 1)
    scores = _without_own(found, own, space.metric)
    return Sample(space, queries, own, neighbours, scores[:, max(neighbours - 1, 0)])


def recall(index: Index, asked: Sample) -> float:
    """The share of true neighbours that the index finds: 1 where it finds others that are as near."""
    if not asked.neighbours:
        return 1.0
    found = index.search(asked.queries, K + 1)
    scores = _without_own(found, asked.own, asked.space.metric)[:, : asked.neighbours]
    last = asked.last[:, None]
    good = scores <= last if asked.space.metric == "euclidean" else scores >= last
    return float(good.mean())


def _without_own(found: Found, own: Rows, metric: Metric) -> Vectors:
    """The scores of the rows that were found, best first, that of the query's own row moved to the end."""
    scores = np.where(found.rows == own[:, None], np.float32(worst(metric)), found.scores)
    return np.take_along_axis(scores, better_first_order(scores, metric), axis=1)
