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
_CLASSES, _PLACE = 100, 16
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


def described(items: int) -> tuple[Vectors, Vectors]:
    """Embeddings and side-information of the same items: what two small networks that end in a ReLU see of them.

    Both say where an item lies among 100 clusters in 16 dimensions, so that items that are near each other are so in what a
    network makes of the two. For 0.99 of the neighbours there, an index of 50,000 reads as many lists, 93 of 1,000, as where the
    same network is given CIFAR-100's embeddings. `clustered` items with side-information that knows nothing of them take a
    graph instead, whose making takes five times as long as the network.

    Returns:
        Two arrays (items, DIMENSION) float32.
    """
    random = np.random.default_rng(0)
    centres = random.standard_normal((_CLASSES, _PLACE), dtype=np.float32)
    networks = random.standard_normal((2, _PLACE, DIMENSION), dtype=np.float32)
    seen = np.empty((2, items, DIMENSION), np.float32)
    for start in range(0, items, _BLOCK):
        rows = seen[:, start : start + _BLOCK]
        places = centres[random.integers(_CLASSES, size=rows.shape[1])]
        places += random.standard_normal(places.shape, dtype=np.float32)
        np.maximum(places @ networks, 0, out=rows)
    return seen[0], seen[1]


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
