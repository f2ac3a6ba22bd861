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

# So many lists are read however far they are.
FEWEST = 8
# Where it leaves out a smaller share of the lists, it is not worth the choosing.
_WORTH = 0.25
# A query that happens to lie near a centroid has its neighbours no nearer for that. As near as this part of the rows that reach
# was measured by, no query counts as nearer.
_NEAREST = 0.25


class Reach(NamedTuple):
    """How far lists may be."""

    #: as the nearest one
    times: float
    #: as which that one counts at the least
    nearest: float

    @classmethod
    def of(cls, stored: Mapping[str, Any] | None) -> Reach:
        """As it stands with an index's parameters; of any distance where nothing does."""
        return EVERYWHERE if stored is None else cls(stored["times"], stored["nearest"])


EVERYWHERE = Reach(inf, 0.0)


def measured(centroids: Vectors, vectors: Stored, asked: Sample, *, nprobe: int, missed: float = 0) -> Reach | None:
    """How far lists may be, at least as far as the nearest one; None where that spares too little.

    As far as the farthest list, of those that are read without it, that holds a neighbour: so none is missed for it.

    Args:
        centroids: (lists, dimension) float32.
        vectors: the column.
        asked: some of its rows, with their neighbours.
        nprobe: how many lists are read without it.
        missed: the share of the neighbours in those lists that may be in farther ones.
    """
    if asked.space.metric == "inner_product" and not asked.space.normalized:
        return None  # no matter of distance
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
    """The same lists, -1 for those that are too far; for each query whatever else is in the batch."""
    far = distances(near.scores, space)
    lists = np.where(far <= np.maximum(far[:, :1], np.float32(reach.nearest)) * np.float32(reach.times), near.lists, -1)
    lists[:, :FEWEST] = near.lists[:, :FEWEST]
    return Nearest(near.scores, lists)


def distances(scores: Vectors, space: Space) -> Vectors:
    """How far lists are whose centroids have these scores.

    By inner product, of vectors of unit length: the root of the mean square of the distances to the rows in the list.
    """
    return scores if space.metric == "euclidean" else np.sqrt(np.maximum(2 - 2 * scores, 0))
