"""Exact search stays exact where shortcuts do not, and costs no memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gallery.arrays import Metric, Space, Vectors
from gallery.index.flat import FlatIndex
from gallery.index.selection import Selected
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


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "euclidean"])
@pytest.mark.parametrize("k", [1, 10, 50, 300])
def test_of_many_rows_that_score_alike_the_smallest_are_found(metric: Metric, k: int) -> None:
    rng = np.random.default_rng(0)
    vectors = np.sign(rng.standard_normal((4000, 16))).astype(
        np.float32
    )  # of one bit for each number: 17 scores in all
    queries = np.sign(rng.standard_normal((12, 16))).astype(np.float32)
    agree = queries @ vectors.T
    index = FlatIndex(vectors / 4 if metric == "cosine" else vectors, Space(metric, normalized=metric == "cosine"))
    asked = queries / 4 if metric == "cosine" else queries
    for mask in (np.ones(4000, np.bool_), rng.random(4000) < 0.5, rng.random(4000) < 0.04):
        chosen = np.flatnonzero(mask)
        expected = [chosen[np.argsort(-line[chosen], kind="stable")][:k] for line in agree]
        selected = None if mask.all() else Selected(mask)
        for some in (asked[:1], asked):
            for found, wanted in zip(index.search(some, k, selected).rows, expected, strict=False):
                assert found[: len(wanted)].tolist() == wanted.tolist()
