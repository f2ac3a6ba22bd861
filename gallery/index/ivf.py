"""FAISS IVF-Flat: rows in lists by nearest centroid, and a search reads the lists of the nearest few."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from gallery.arrays import Space, Stored
from gallery.index import _exact, _faiss, _ivf
from gallery.index._library import faiss
from gallery.index.base import Trained


class Ivf(_ivf.Lists):
    """Lists that hold the vectors themselves, mapped from disk."""

    name: ClassVar[str] = "ivf"

    def open(
        self, vectors: Stored, *, space: Space, path: Path | None, parameters: Mapping[str, Any]
    ) -> _ivf.MappedIndex:
        """Map the lists; raises ValueError if the file does not fit the column."""
        lists = _faiss.mapped(self.name, path, faiss.IO_FLAG_MMAP, vectors)
        return _ivf.MappedIndex(self.name, lists, nprobe=parameters["nprobe"], vectors=vectors, space=space)

    def _empty(self, trained: Trained, space: Space, vectors: Stored) -> Any:  # noqa: ARG002
        lists, dimension = trained.centroids.shape
        return faiss.IndexIVFFlat(
            _ivf.by_distance(trained.centroids), dimension, lists, _exact.faiss_metric(space.metric)
        )


BACKEND = Ivf()
