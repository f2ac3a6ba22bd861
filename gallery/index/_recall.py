"""How much of the truth an approximate index finds, measured on the column's own rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gallery.arrays import Mask, Metric, Rows, Space, Stored, Vectors
from gallery.index import _exact
from gallery.index.base import Found, Index
from gallery.index.scores import better_first_order, worst

# Recall is that of the best ten.
K = 10
# How many rows are used as queries. They have 2,000 neighbours, from which a recall of 0.98 is known to about 0.003.
ROWS = 200


class Sample(NamedTuple):
    """Some rows of a column as queries, with the scores of their true neighbours.

    Attributes:
        space: decides the score.
        queries: (queries, dimension) float32.
        own: (queries,) the row that each query is; it is no neighbour of itself.
        rows: (queries, neighbours) int64, best first: K of them, or as many as there are.
        scores: (queries, neighbours) float32, theirs.
        tied: (queries, neighbours) True where the next row has the same score, so that a search may rightly find that one.
    """

    space: Space
    queries: Vectors
    own: Rows
    rows: Rows
    scores: Vectors
    tied: Mask


def sample(vectors: Stored, space: Space) -> Sample:
    """Draw rows with a fixed seed, so that building again measures the same, and search them exactly."""
    total = len(vectors)
    own = np.sort(np.random.default_rng(2).choice(total, min(ROWS, total), replace=False)).astype(np.int64)
    queries = _exact.prepared(vectors[own], space)
    found = _without_own(_exact.search_column(queries, vectors, K + 2, space, None), own, space.metric)
    count = min(K, total - 1)
    tied = found.scores[:, :count] == found.scores[:, 1 : count + 1]
    return Sample(space, queries, own, found.rows[:, :count], found.scores[:, :count], tied)


def recall(index: Index, asked: Sample) -> float:
    """The share of a sample's neighbours that an index finds; others that are as near count as found."""
    wanted = asked.scores.shape[1]
    if not wanted:
        return 1.0
    scores = _without_own(index.search(asked.queries, K + 1), asked.own, asked.space.metric).scores
    return _share(scores[:, :wanted], asked.scores[:, wanted - 1 :], asked.space.metric)


def held(places: Rows, asked: Sample, nprobe: int) -> float:
    """An upper bound of the recall with `nprobe` lists, known without a search: the share of neighbours in those lists.

    (A search finds more only where the lists hold too few rows, so that it goes on to compare all; do not count on that.)

    Args:
        places: (queries, neighbours) which list of its query each neighbour is in, as `Steered.places` says.
        asked: the sample.
        nprobe: how many lists are read.
    """
    return float(((places < nprobe) | asked.tied[:, -1:]).mean())


def _share(scores: Vectors, last: Vectors, metric: Metric) -> float:
    """The share of scores (queries, n) that are no worse than the last (queries, 1) that is wanted."""
    return float((scores <= last if metric == "euclidean" else scores >= last).mean())


def _without_own(found: Found, own: Rows, metric: Metric) -> Found:
    """The same rows, best first, with each query's own row moved to the end and given the worst score."""
    scores = np.where(found.rows == own[:, None], np.float32(worst(metric)), found.scores)
    order = better_first_order(scores, metric)
    return Found(*(np.take_along_axis(each, order, axis=1) for each in (scores, found.rows)))
