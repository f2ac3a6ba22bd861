"""Clustered vectors, columns mapped from disk, and the naive reference that every backend is held to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from gallery.arrays import Mask, Metric, Space, Stored, Vectors
from gallery.index import registry
from gallery.index.base import Index

ROWS, DIMENSION, CLUSTERS = 6000, 24, 60


@pytest.fixture(scope="session")
def clustered() -> Vectors:
    """(6000, 24) float32 in 60 clusters, of lengths that differ by a factor of two."""
    rng = np.random.default_rng(3)
    centers = rng.standard_normal((CLUSTERS, DIMENSION))
    points = centers[rng.integers(CLUSTERS, size=ROWS)] + 0.4 * rng.standard_normal((ROWS, DIMENSION))
    return (points * rng.uniform(0.7, 1.4, (ROWS, 1))).astype(np.float32)


@pytest.fixture(scope="session")
def queries(clustered: Vectors) -> Vectors:
    """(64, 24) float32 of unit length, near the clusters."""
    return unit_length(near(clustered))


@pytest.fixture(scope="session")
def built(clustered: Vectors, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Space, str], Built]:
    """An index over the clustered vectors in a mapped column; each is built once, because none ever changes."""

    @cache
    def make(name: str, space: Space, dtype: str) -> Built:
        folder = tmp_path_factory.mktemp("built")
        np.save(folder / "column.npy", column_of(clustered, space, dtype))
        (folder / "column.npy").chmod(0o400)
        column: Stored = np.load(folder / "column.npy", mmap_mode="r")
        return Built(build(name, column, space, folder), column, queries_of(clustered, space))

    return make


class Built(NamedTuple):
    """An open index, the column it searches, and queries of its space."""

    index: Index
    column: Stored
    queries: Vectors


def unit_length(vectors: NDArray[Any]) -> Vectors:
    """Rows of length one, by another way than the code under test."""
    scaled: Vectors = (vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)
    return scaled


def near(vectors: Vectors) -> Vectors:
    """(64, dimension) float32 near some of the vectors."""
    rng = np.random.default_rng(4)
    chosen = vectors[rng.choice(len(vectors), 64, replace=False)]
    return (chosen + 0.1 * rng.standard_normal(chosen.shape)).astype(np.float32)


def queries_of(vectors: Vectors, space: Space) -> Vectors:
    """What the space is asked with: of unit length where its vectors are, or where length does not count."""
    return unit_length(near(vectors)) if space.normalized or space.metric == "cosine" else near(vectors)


def column_of(vectors: Vectors, space: Space, dtype: str) -> NDArray[Any]:
    """What is stored: of unit length where the space says so."""
    return (unit_length(vectors) if space.normalized else vectors).astype(dtype)


def build(name: str, vectors: Stored, space: Space, folder: Path, **parameters: Any) -> Index:
    """Build and open an index as the rest of the gallery does."""
    backend = registry.backend(name)
    full = backend.check(parameters)
    path = folder / f"{name}.index"
    has_file = backend.build(vectors, space=space, path=path, parameters=full)
    return backend.open(vectors, space=space, path=path if has_file else None, parameters=full)


def reference(queries: Vectors, vectors: Stored, metric: Metric) -> NDArray[np.float64]:
    """(queries, rows) scores in float64, by the textbook."""
    q, v = queries.astype(np.float64), np.asarray(vectors, dtype=np.float64)
    if metric == "euclidean":
        return np.stack([np.linalg.norm(v - one, axis=1) for one in q])
    if metric == "cosine":
        lengths = np.linalg.norm(v, axis=1)
        return q @ (v / np.where(lengths == 0, 1, lengths)[:, None]).T
    return q @ v.T


def best(scores: NDArray[np.float64], metric: Metric, k: int, selected: Mask | None = None) -> NDArray[np.intp]:
    """(queries, k) rows of the reference, best first, the smaller row first among equals."""
    key = scores if metric == "euclidean" else -scores
    if selected is not None:
        key = np.where(selected, key, np.inf)
    return np.argsort(key, axis=1, kind="stable")[:, :k]
