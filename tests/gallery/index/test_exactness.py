"""Exact search is exact however it is done: one by one, by matrix products, block by block, with rows left out."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from gallery import errors
from gallery.arrays import Mask, Metric, Space, Vectors
from gallery.index import _exact
from gallery.index.base import Found
from gallery.index.scores import score, score_rows, unit
from gallery.index.selection import Selected
from tests.gallery.index.conftest import best, build, near, reference, unit_length
from tests.real_data import EMBEDDINGS, needs

METRICS: tuple[Metric, ...] = ("cosine", "inner_product", "euclidean")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("selects", [None, 0.9, 0.02])
def test_a_batch_gets_the_very_answers_of_its_queries_alone(
    metric: Metric, selects: float | None, clustered: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_exact, "BLOCK", 1000)
    vectors = unit(clustered) if metric == "cosine" else clustered
    queries = unit_length(near(vectors)) if metric == "cosine" else near(vectors)
    selected = None if selects is None else np.random.default_rng(7).random(len(vectors)) < selects
    for k in (1, 10, 300):
        chosen = None if selected is None else Selected(selected)
        together = _exact.search(queries, vectors, k, metric, chosen)
        for at in (0, 9, 63):
            same(_exact.search(queries[at : at + 1], vectors, k, metric, chosen), one(together, at))
        assert_exact(together, queries, vectors, metric, k, selected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_row_that_a_damaged_index_leads_to_and_the_column_does_not_have_is_refused(dtype: str) -> None:
    """FAISS would read there, wherever that is, and the process would end."""
    column, queries = np.ones((3, 2), dtype), np.ones((1, 2), np.float32)
    space = Space("euclidean", normalized=False)
    assert _exact.scores_of(queries, np.array([[2, -1]]), column, space).tolist() == [[0.0, np.inf]]
    with pytest.raises(errors.Damaged, match="--repair"):
        _exact.scores_of(queries, np.array([[0, 10**9]]), column, space)


@pytest.mark.parametrize("metric", METRICS)
def test_of_equal_rows_the_smaller_ones_are_found_even_where_k_cuts_through_them(metric: Metric) -> None:
    rng = np.random.default_rng(8)
    distinct = unit_length(rng.standard_normal((300, 16)))
    vectors = np.tile(distinct, (6, 1))  # each row six times, far apart
    for queries in (distinct[:3], distinct[:40]):
        found = _exact.search(queries, vectors, 4, metric)
        at = np.arange(len(queries))[:, None]
        assert np.array_equal(found.rows, at + 300 * np.arange(4))


def test_rows_that_a_matrix_product_cannot_tell_apart_are_told_apart_in_a_batch() -> None:
    vectors = (1000 + 0.01 * np.random.default_rng(9).standard_normal((3000, 128))).astype(np.float32)
    queries = vectors[:50]
    products, rows = _exact._knn(queries, vectors, 1, "euclidean", None)
    assert (rows[:, 0] != np.arange(50)).any(), "the product was right after all, so this test shows nothing"
    assert not _exact.beyond_doubt(np.zeros(50, np.float32), products, queries, 12_000.0, "euclidean").any()
    assert np.array_equal(_exact.search(queries, vectors, 1, "euclidean").rows[:, 0], np.arange(50))


def test_numbers_beyond_the_range_of_a_square_leave_an_answer_that_is_right() -> None:
    vectors = np.full((40, 64), 1e25, np.float32)
    vectors[:20] = np.random.default_rng(10).standard_normal((20, 64))
    queries = np.repeat(vectors[:20], 2, axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        found = _exact.search(queries, vectors, 1, "euclidean")
    assert np.array_equal(found.rows[:, 0], np.repeat(np.arange(20), 2))


@pytest.mark.parametrize("metric", METRICS)
def test_a_large_batch_of_clustered_queries_needs_no_second_search(
    metric: Metric, clustered: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = unit(clustered) if metric == "cosine" else clustered
    queries = unit_length(near(vectors)) if metric == "cosine" else near(vectors)
    asked: list[int] = []
    alone = _exact._one_by_one

    def counted(queries: Vectors, vectors: Vectors, k: int, metric: Metric, selected: Selected | None) -> Found:
        asked.append(len(queries))
        return alone(queries, vectors, k, metric, selected)

    monkeypatch.setattr(_exact, "_one_by_one", counted)
    _exact.search(queries, vectors, 10, metric)
    assert sum(asked) <= 3


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dimension", [1, 3, 24, 129])
def test_rows_scored_in_place_have_the_score_that_search_and_score_give(metric: Metric, dimension: int) -> None:
    rng = np.random.default_rng(11)
    buffer = rng.standard_normal(50 * dimension + 1).astype(np.float32)
    vectors = buffer[1:].reshape(50, dimension)  # lies at an odd address, as a part of a file may
    vectors = unit(vectors) if metric == "cosine" else vectors
    queries = unit_length(rng.standard_normal((3, dimension)))
    rows = rng.integers(50, size=(3, 20))
    in_place = score_rows(queries, vectors, rows, metric)
    assert np.array_equal(in_place, score(queries, vectors[rows], metric))
    everything = _exact.search(queries, vectors, 50, metric)
    for at, row in itertools.product(range(3), range(20)):
        place = np.flatnonzero(everything.rows[at] == rows[at, row])[0]
        assert everything.scores[at, place] == in_place[at, row]


def test_what_has_unit_length_keeps_its_bytes() -> None:
    vectors = np.random.default_rng(12).standard_normal((2000, 37)).astype(np.float32)
    once = unit(vectors)
    assert np.array_equal(unit(once), once)


@needs(EMBEDDINGS)
@pytest.mark.parametrize("name", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize("metric", METRICS)
def test_real_embeddings_are_found_under_every_metric_with_rows_left_out(
    name: str, metric: Metric, tmp_path: Path
) -> None:
    with np.load(EMBEDDINGS) as data:
        vectors, queries = data["new_test"][::4].astype(np.float32), data["new_train"][::1000].astype(np.float32)
    queries = unit_length(queries) if metric == "cosine" else queries
    index = build(name, vectors, Space(metric, normalized=False), tmp_path)
    rng = np.random.default_rng(13)
    for share in (None, 0.9, 0.3, 0.004):
        selected = None if share is None else rng.random(len(vectors)) < share
        found = index.search(queries, 10, None if selected is None else Selected(selected))
        truth = best(reference(queries, vectors, metric), metric, 10, selected)
        there = min(10, len(vectors) if selected is None else int(selected.sum()))
        assert (found.rows[:, :there] >= 0).all()
        assert (found.rows[:, there:] == -1).all()
        right = [len(set(a[:there]) & set(b[:there])) for a, b in zip(found.rows, truth, strict=True)]
        assert np.mean(right) / there >= (1 if name == "flat" else 0.95)


def assert_exact(
    found: Found, queries: Vectors, vectors: Vectors, metric: Metric, k: int, selected: Mask | None
) -> None:
    scores = reference(queries, vectors, metric)
    there = min(k, len(vectors) if selected is None else int(selected.sum()))
    truth = best(scores, metric, k, selected)[:, :there]
    assert (found.rows[:, there:] == -1).all()
    np.testing.assert_allclose(found.scores[:, :there], np.take_along_axis(scores, truth, axis=1), rtol=2e-6, atol=2e-6)


def one(found: Found, at: int) -> Found:
    return Found(found.scores[at : at + 1], found.rows[at : at + 1])


def same(first: Found, second: Found) -> None:
    assert np.array_equal(first.rows, second.rows)
    assert np.array_equal(first.scores, second.scores)
