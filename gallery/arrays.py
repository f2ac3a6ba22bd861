"""The arrays that pass through the gallery, by what they hold."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Metric = Literal["cosine", "inner_product", "euclidean"]
#: how numbers are stored
Dtype = Literal["float32", "float16"]
#: whether a model itself made a stored vector, or a transformation did
Origin = Literal["native", "derived"]
#: (n, dimension) float32, in memory
Vectors = NDArray[np.float32]
#: (n, dimension) float32 or float16, usually memory-mapped
Stored = NDArray[np.floating[Any]]
#: positions in a segment
Rows = NDArray[np.int64]
#: (rows,) which rows are meant
Mask = NDArray[np.bool_]


class Space(NamedTuple):
    """What decides a score: the metric, and whether stored vectors already have unit length."""

    metric: Metric
    normalized: bool
