"""How much farther than the nearest list of a query another may be to be worth reading, measured on the column's own rows."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, inf
from typing import Any, NamedTuple

import numpy as np

from gallery.arrays import Space, Stored, Vectors
from gallery.index import _exact
from gallery.index._recall import Sample
from gallery.index.quantizer import Nearest, shared

# The nearest so many lists are read, however far away they are.
FEWEST = 8
# A reach that leaves out less than this share of the lists is not used: choosing would cost more than it saves.
_WORTH = 0.25
# A query that happens to lie very near a centroid does not have nearer neighbours for that. So its distance to the nearest
# list is taken to be at least this quantile of those distances among the rows that the reach was measured with.
_NEAREST = 0.25


class Reach(NamedTuple):
    """How far away lists may be to be read: `times` as far as the nearest one, which counts as at least `nearest` away."""

    times: float
    nearest: float

    @classmethod
    def of(cls, stored: Mapping[str, Any] | None) -> Reach:
        """As an index's parameters hold it; `EVERYWHERE` where they hold none."""
        return EVERYWHERE if stored is None else cls(stored["times"], stored["nearest"])


EVERYWHERE = Reach(inf, 0.0)


def measured(centroids: Vectors, vectors: Stored, asked: Sample, *, nprobe: int, missed: float = 0) -> Reach | None:
    """The smallest reach that still reads all lists that hold a neighbour (but for `missed`); None if it saves too little.

    Args:
        centroids: (lists, dimension) float32.
        vectors: the column.
        asked: some of its rows, with their neighbours.
        nprobe: how many lists are read without a reach.
        missed: the share of the neighbours in those lists that may be in farther ones.
    """
    if asked.space.metric == "inner_product" and not asked.space.normalized:
        return None  # the best rows need not be in near lists
    quantizer, rows = shared(centroids, asked.space.metric), asked.rows
    near = quantizer.nearest(asked.queries, min(nprobe, len(quantizer)))  # shared lists may be fewer
    own = quantizer.holding(_exact.prepared(vectors[rows.ravel()], asked.space)).reshape(*rows.shape, 1)
    places = near.lists[:, None, :] == own  # (queries, neighbours, lists)
    far = distances(near.scores, asked.space)
    nearest = float(np.quantile(far[:, 0], _NEAREST))
    needed = far / np.maximum(far[:, :1].astype(np.float64), max(nearest, float(np.finfo(np.float32).tiny)))
    needed[:, :FEWEST] = 1
    of_neighbours = np.append(np.broadcast_to(needed[:, None, :], places.shape)[places], 1)
    farthest = max(1.0, float(np.quantile(of_neighbours, 1 - missed, method="higher")))
    return Reach(ceil(100 * farthest) / 100, nearest) if (needed > farthest).mean() >= _WORTH else None


def within(near: Nearest, reach: Reach, space: Space) -> Nearest:
    """The same lists, with -1 in place of those beyond the reach. A query's lists do not depend on the rest of the batch."""
    far = distances(near.scores, space)
    lists = np.where(far <= np.maximum(far[:, :1], np.float32(reach.nearest)) * np.float32(reach.times), near.lists, -1)
    lists[:, :FEWEST] = near.lists[:, :FEWEST]
    return Nearest(near.scores, lists)


def distances(scores: Vectors, space: Space) -> Vectors:
    """Distances to lists whose centroids have these scores.

    Where the scores are inner products, vectors have unit length, and this is the root of the mean square of the distances to
    the rows in the list.
    """
    return scores if space.metric == "euclidean" else np.sqrt(np.maximum(2 - 2 * scores, 0))
