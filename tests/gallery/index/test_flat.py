"""Exact search stays exact where shortcuts do not, and costs no memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gallery.arrays import Space, Vectors
from gallery.index.flat import FlatIndex
from tests.gallery.index.conftest import best, build, reference


def test_near_vectors_far_from_the_origin_are_told_apart_in_a_large_batch(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = (100 + 0.01 * rng.standard_normal((1500, 128))).astype(np.float32)
    found = build("flat", vectors, Space("euclidean", normalized=False), tmp_path).search(vectors, 3)
    assert np.array_equal(found.rows[:, 0], np.arange(1500))
    assert np.array_equal(found.scores[:, 0], np.zeros(1500))
    expected = reference(vectors[:50], vectors, "euclidean")
    np.testing.assert_allclose(found.scores[:50], np.sort(expected, axis=1)[:, :3], atol=1e-5)


def test_a_plain_column_is_searched_where_it_lies(clustered: Vectors) -> None:
    for space in (Space("euclidean", normalized=False), Space("cosine", normalized=True)):
        assert np.shares_memory(FlatIndex(clustered, space)._ready(), clustered)


def test_float16_columns_are_ranked_by_their_rounded_values(clustered: Vectors, queries: Vectors) -> None:
    column = clustered.astype(np.float16)
    found = FlatIndex(column, Space("cosine", normalized=True)).search(queries, 10)
    assert np.array_equal(found.rows, best(reference(queries, column, "cosine"), "cosine", 10))
