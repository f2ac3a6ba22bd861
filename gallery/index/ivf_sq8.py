"""Inverted lists of a byte for each number: a quarter of the memory, for galleries that are larger than it.

More rows are proposed than wanted, and scored exactly from the column, of which only these are read.
"""

from __future__ import annotations

from typing import Any

from gallery.index import _ivf
from gallery.index._library import faiss
from gallery.index._parameters import Whole

PARAMETERS = {
    **_ivf.PARAMETERS,
    # Candidates for each row that is wanted. For SIFT vectors 2 were enough to find what flat lists find; among rows that are
    # all about as far from the query, 4 lost a fortieth.
    "rerank": Whole(default=8, low=1, high=64),
}


def _empty(quantizer: Any, dimension: int, lists: int, metric: int) -> Any:
    """Numbers between the least and the greatest of their dimension; what is left of a centroid was coded no better."""
    coding = faiss.ScalarQuantizer.QT_8bit
    return faiss.IndexIVFScalarQuantizer(quantizer, dimension, lists, coding, metric, False)


BACKEND = _ivf.Lists("ivf_sq8", _empty, PARAMETERS)
