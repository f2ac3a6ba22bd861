"""The vectors that everything is measured on, and what exact search finds in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from gallery.arrays import Vectors

DIMENSION = 128
K = 10
QUERIES = 1000
#: the file with real embeddings: `new_train` are the items and `new_test` the queries
EMBEDDINGS = "cifar100_embeddings.npz"

_CLUSTERS = 1000
_LATENT = 24
_BLOCK = 100_000


class Data(NamedTuple):
    """Items and queries of one space; both float32."""

    name: str
    #: (n, DIMENSION)
    items: Vectors
    #: (QUERIES, DIMENSION), drawn as the items were, and none of them
    queries: Vectors

    def first(self, count: int) -> Data:
        """The same with fewer items."""
        return self._replace(items=self.items[:count])


def clustered(items: int) -> Data:
    """Vectors in 1,000 clusters that vary in 24 directions, so that neighbours exist, as they do among embeddings.

    Of independent noise in 128 dimensions all vectors are about equally far from each other, and no index finds anything.
    """
    random = np.random.default_rng(0)
    centres = random.standard_normal((_CLUSTERS, DIMENSION), dtype=np.float32)
    directions = random.standard_normal((_LATENT, DIMENSION), dtype=np.float32) * np.float32(0.2)

    def draw(count: int) -> Vectors:
        drawn = np.empty((count, DIMENSION), np.float32)
        for start in range(0, count, _BLOCK):
            rows = drawn[start : start + _BLOCK]
            rows[:] = centres[random.integers(_CLUSTERS, size=len(rows))]
            rows += random.standard_normal((len(rows), _LATENT), dtype=np.float32) @ directions
        return drawn

    queries = draw(QUERIES)
    return Data(f"{items:,} clustered vectors", draw(items), queries)


def real(root: Path) -> Data:
    """CIFAR-100 as a network saw it: 50,000 embeddings of its training images, asked by those of its test images."""
    with np.load(root / EMBEDDINGS, allow_pickle=False) as arrays:
        items, queries = (arrays[name].astype(np.float32) for name in ("new_train", "new_test"))
    asked = np.random.default_rng(0).choice(len(queries), QUERIES, replace=False)
    return Data(f"{len(items):,} CIFAR-100 embeddings", items, queries[asked])


def nearest(data: Data) -> NDArray[np.int64]:
    """The rows of the `K` nearest items of each query, by exact search."""
    _, rows = faiss.knn(data.queries, np.ascontiguousarray(data.items), K)
    found: NDArray[np.int64] = rows
    return found


def recall(found: Sequence[Sequence[str]], truth: NDArray[np.int64]) -> float:
    """The part of what exact search finds that is in the answers; ids are row numbers.

    Args:
        found: ids by query; fewer queries than `truth` has are judged by its first rows.
        truth: (queries, K) rows.
    """
    hits = sum(len({int(item) for item in ids} & set(rows.tolist())) for ids, rows in zip(found, truth, strict=False))
    return hits / (len(found) * K)
