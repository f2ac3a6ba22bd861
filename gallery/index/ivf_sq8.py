"""Inverted lists of a byte for each number: a quarter of the memory, for galleries that are larger than it.

More rows are proposed than wanted, and scored exactly from the column, of which only these are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from gallery.arrays import Space, Stored
from gallery.index import _exact, _faiss, _ivf
from gallery.index._library import faiss
from gallery.index._parameters import Whole
from gallery.index.base import Trained
from gallery.index.quantizer import training_rows


class Sq8Index(_ivf.MappedIndex):
    """Lists of bytes, mapped from disk."""

    def __init__(self, *given: Any, rerank: int, **named: Any) -> None:
        super().__init__(*given, **named)
        self._rerank = rerank

    def compared(self, k: int, *, roughly: bool = False) -> int:  # noqa: ARG002
        """`rerank` rows for each that is wanted."""
        return self._rerank * k


class Sq8(_ivf.Lists):
    """Lists that hold numbers between the least and the greatest of their dimension."""

    name: ClassVar[str] = "ivf_sq8"
    parameters: ClassVar[Mapping[str, Whole]] = {
        **_ivf.PARAMETERS,
        # Candidates for each row that is wanted. For SIFT vectors 2 were enough to find what flat lists find; among rows that
        # are all about as far from the query, 4 lost a fortieth.
        "rerank": Whole(default=8, low=1, high=64),
    }

    def open(self, vectors: Stored, *, space: Space, path: Path | None, parameters: Mapping[str, Any]) -> Sq8Index:
        """Map the lists; raises ValueError if the file does not fit the column."""
        lists = _faiss.mapped(self.name, path, faiss.IO_FLAG_MMAP, vectors)
        steer = {"nprobe": parameters["nprobe"], "rerank": parameters["rerank"]}
        return Sq8Index(self.name, lists, vectors=vectors, space=space, **steer)

    def _empty(self, trained: Trained, space: Space, vectors: Stored) -> Any:
        """What is left of a row beyond its centroid was coded no better than the row itself."""
        lists, dimension = trained.centroids.shape
        coding, metric = faiss.ScalarQuantizer.QT_8bit, _exact.faiss_metric(space.metric)
        by = _ivf.by_distance(trained.centroids)
        index = faiss.IndexIVFScalarQuantizer(by, dimension, lists, coding, metric, False)
        if len(vectors):
            index.train(training_rows([vectors], space, lists))  # what is in the lists; the centroids are left alone
        return index


BACKEND = Sq8()
