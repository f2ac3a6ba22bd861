"""FAISS IVF-Flat: rows in lists by nearest centroid, and a search reads the lists of the nearest few."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from gallery.index import _exact, _faiss, _parameters
from gallery.index._library import faiss
from gallery.index._parameters import Whole
from gallery.index.base import Space, Stored, Vectors

# FAISS asks for at least 39 training rows for each centroid; more than this many do not make better ones.
TRAINING_ROWS_PER_LIST = 64

PARAMETERS = {
    "nlist": Whole(default=0, low=0, high=1 << 20),  # 0: the square root of the number of rows
    "nprobe": Whole(default=16, low=1, high=1 << 20),
}


class Ivf:
    """Inverted lists over a trained coarse quantizer, mapped from disk.

    Parameters:
        nlist: how many lists; 0 chooses the square root of the number of rows. Never more than there are rows.
        nprobe: how many of them a search reads; all of them make it exact. May change after the build.
    """

    name = "ivf"

    def build(self, vectors: Stored, *, space: Space, path: Path, parameters: Mapping[str, Any]) -> bool:
        """Train on a sample of the column and write its lists; the same column gives the same bytes."""
        rows, dimension = vectors.shape
        nlist = min(parameters["nlist"] or max(1, round(sqrt(rows))), rows)
        metric = _exact.faiss_metric(space.metric)
        quantizer = faiss.IndexFlat(dimension, metric)
        index = faiss.IndexIVFFlat(quantizer, dimension, nlist, metric)
        index.cp.seed = 1
        index.cp.spherical = metric == faiss.METRIC_INNER_PRODUCT
        index.cp.min_points_per_centroid = 1  # few rows are no reason to print a warning: `flat` is there for them
        index.train(_training_rows(vectors, space, nlist))
        for block in _faiss.blocks(vectors, space):
            index.add(block)
        faiss.write_index(index, str(path))
        return True

    def open(
        self, vectors: Stored, *, space: Space, path: Path | None, parameters: Mapping[str, Any]
    ) -> _faiss.FaissIndex:
        """Map the lists; raises ValueError if the file does not fit the column."""
        nprobe: int = parameters["nprobe"]

        def steer(selector: Any, effort: float) -> Any:
            return faiss.SearchParametersIVF(sel=selector, nprobe=ceil(nprobe * effort))

        return _faiss.opened(self.name, path, faiss.IO_FLAG_MMAP, vectors=vectors, space=space, steer=steer)

    def check(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with defaults filled in; ValueError where one is unknown or out of range."""
        return _parameters.checked(self.name, parameters, PARAMETERS)


def _training_rows(vectors: Stored, space: Space, nlist: int) -> Vectors:
    """A sample drawn with a fixed seed, so that building again gives the same index."""
    wanted = nlist * TRAINING_ROWS_PER_LIST
    if wanted >= len(vectors):
        return _exact.prepared(vectors, space)
    sample = np.random.default_rng(1).choice(len(vectors), wanted, replace=False)
    return _exact.prepared(vectors[np.sort(sample)], space)


BACKEND = Ivf()
