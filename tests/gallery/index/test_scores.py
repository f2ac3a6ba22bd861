"""The score is one pure function of a query and a vector."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gallery.arrays import Metric
from gallery.index.scores import better_first_order, cut, score, unit, worst
from tests.gallery.index.conftest import reference, unit_length

METRICS: tuple[Metric, ...] = ("cosine", "inner_product", "euclidean")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("dimension", [1, 3, 24, 129])
def test_scores_equal_the_textbook(metric: Metric, dtype: str, dimension: int) -> None:
    rng = np.random.default_rng(0)
    queries = unit_length(rng.standard_normal((5, dimension)))
    vectors = rng.standard_normal((40, dimension)).astype(dtype)
    np.testing.assert_allclose(score(queries, vectors, metric), reference(queries, vectors, metric), atol=2e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dimension", [1, 2, 7, 64, 128, 1000])
def test_a_pair_has_the_same_score_to_the_last_bit_whatever_the_batch(metric: Metric, dimension: int) -> None:
    rng = np.random.default_rng(1)
    queries = unit_length(rng.standard_normal((9, dimension)))
    vectors = rng.standard_normal((9, 11, dimension)).astype(np.float32)
    together = score(queries, vectors, metric)
    alone = [
        [score(queries[i : i + 1], vectors[i : i + 1, j : j + 1], metric)[0, 0] for j in range(11)] for i in range(9)
    ]
    shared = [score(queries[i : i + 1], vectors[i], metric)[0] for i in range(9)]
    assert np.array_equal(together, np.array(alone, np.float32).reshape(9, 11))
    assert np.array_equal(together, np.array(shared))


def test_a_vector_is_at_distance_zero_from_itself_however_long_it_is() -> None:
    vectors = (np.random.default_rng(2).standard_normal((8, 64)) + 1e4).astype(np.float32)
    assert np.array_equal(np.diag(score(vectors, vectors, "euclidean")), np.zeros(8))


def test_small_distances_between_long_vectors_survive() -> None:
    query = np.full((1, 64), 1e3, np.float32)
    other = query.copy()
    other[0, 0] += 0.5
    assert score(query, other, "euclidean")[0, 0] == 0.5


def test_a_zero_vector_scores_zero_under_cosine() -> None:
    query = unit_length(np.ones((1, 4)))
    assert score(query, np.zeros((1, 3, 4), np.float32), "cosine").tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_unit_vectors_have_length_one_whatever_the_size(size: float) -> None:
    vectors = (np.random.default_rng(3).standard_normal((6, 5)) * size).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(unit(vectors), axis=1), 1, atol=1e-6)


def test_unit_leaves_zeros_and_what_it_was_given() -> None:
    vectors = np.array([[0, 0], [3, 4]], np.float32)
    assert np.allclose(unit(vectors), [[0, 0], [0.6, 0.8]])
    assert vectors.tolist() == [[0, 0], [3, 4]]


def test_the_worst_score_is_worse_than_any() -> None:
    scores = np.array([worst("cosine"), -1e30, 1.0], np.float32)
    assert better_first_order(scores, "cosine").tolist() == [2, 1, 0]
    distances = np.array([worst("euclidean"), 1e30, 1.0], np.float32)
    assert better_first_order(distances, "euclidean").tolist() == [2, 1, 0]


def test_equal_scores_stay_in_their_order() -> None:
    scores = np.array([[1, 2, 2, 1]], np.float32)
    assert better_first_order(scores, "cosine").tolist() == [[1, 2, 0, 3]]
    assert better_first_order(scores, "euclidean").tolist() == [[0, 3, 1, 2]]


def test_cut_keeps_the_best_and_pads_to_k() -> None:
    scores, rows = cut(np.array([[-np.inf, 5, 7]], np.float32), np.array([[-1, 4, 2]]), "inner_product", 4)
    assert rows.tolist() == [[2, 4, -1, -1]]
    assert scores.tolist() == [[7, 5, -np.inf, -np.inf]]


_THREADS = """
import os
import numpy as np
from gallery.index.scores import score
def started(queries):
    before = len(os.listdir("/proc/self/task"))
    score(np.ones((queries, 8), np.float32), np.ones((queries, 100, 8), np.float32), "METRIC")
    return len(os.listdir("/proc/self/task")) - before
print(started(1), started(4))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists a process's threads")
@pytest.mark.parametrize("metric", ["inner_product", "euclidean"])
def test_no_threads_are_gathered_for_a_lone_query(metric: Metric) -> None:
    several = {**os.environ, "OMP_NUM_THREADS": "4"}
    words = [sys.executable, "-c", _THREADS.replace("METRIC", metric)]
    ran = subprocess.run(words, env=several, check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["0", "3"]
