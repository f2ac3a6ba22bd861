"""Every registered backend against the naive reference: what is in the folder is checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery.arrays import Mask, Metric, Space, Stored, Vectors
from gallery.index import _filtering, registry
from gallery.index.base import Found
from gallery.index.quantizer import Assignments
from gallery.index.selection import Selected
from tests.gallery.index.conftest import Built, best, build, column_of, reference, unit_length
from tests.real_data import SIFT, needs

EXACT = {"flat"}
SPACES = [Space(m, n) for m, n in itertools.product(("cosine", "inner_product", "euclidean"), (True, False))]

Make = Callable[[str, Space, str], Built]
every_backend = pytest.mark.parametrize("name", registry.names())
every_space = pytest.mark.parametrize("space", SPACES, ids=lambda s: f"{s.metric}-{'unit' if s.normalized else 'any'}")
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float16"])


@every_backend
@every_space
@every_dtype
class TestAnswers:
    """What is found, in every space and storage type, over a column mapped from a read-only file."""

    @pytest.fixture(autouse=True)
    def lists_are_read_for_few_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As they are of large segments, or all of these would be compared."""
        monkeypatch.setattr(_filtering, "FEW", 0)
        monkeypatch.setattr(_filtering, "SPARSE", 2)

    def test_the_best_rows_are_found_with_their_exact_scores(
        self, name: str, space: Space, dtype: str, built: Make
    ) -> None:
        index, column, queries = built(name, space, dtype)
        assert_right(name, index.search(queries, 10), queries, column, space.metric, 10)

    @pytest.mark.parametrize("share", [0.99, 0.9, 0.6, 0.4, 0.1, 0.01])
    def test_rows_that_are_not_selected_are_never_found(
        self, name: str, space: Space, dtype: str, share: float, built: Make
    ) -> None:
        index, column, queries = built(name, space, dtype)
        selected = np.random.default_rng(5).random(len(column)) < share
        found = index.search(queries, 10, Selected(selected))
        assert_right(name, found, queries, column, space.metric, 10, selected)

    @pytest.mark.parametrize("count", [3500, 2500])
    def test_a_selection_far_from_the_queries_is_searched_too(
        self, name: str, space: Space, dtype: str, count: int, built: Make
    ) -> None:
        index, column, queries = built(name, space, dtype)
        far = best(reference(queries[:1], column, space.metric), space.metric, len(column))[0, -count:]
        selected = np.isin(np.arange(len(column)), far)
        found = index.search(queries[:1], 10, Selected(selected))
        assert_right(name, found, queries[:1], column, space.metric, 10, selected, recall=0.9)

    def test_an_answer_does_not_depend_on_the_batch(self, name: str, space: Space, dtype: str, built: Make) -> None:
        index, _, queries = built(name, space, dtype)
        together = index.search(queries, 10)
        for i in range(0, len(queries), 7):
            alone = index.search(queries[i : i + 1], 10)
            assert np.array_equal(alone.rows[0], together.rows[i])
            assert np.array_equal(alone.scores[0], together.scores[i])

    def test_an_answer_does_not_depend_on_whether_others_are_asked_too(
        self, name: str, space: Space, dtype: str, built: Make
    ) -> None:
        index, _, queries = built(name, space, dtype)
        for count in (1, 3, 20):
            asked = queries[:count].copy()
            assert_same(index.search(asked, 10, None, Assignments(asked)), index.search(asked, 10))

    def test_stored_rows_find_themselves(self, name: str, space: Space, dtype: str, built: Make) -> None:
        index, column, _ = built(name, space, dtype)
        themselves = np.array(column[:32], dtype=np.float32)
        if space.metric == "euclidean":
            assert np.array_equal(index.search(themselves, 1).scores, np.zeros((32, 1)))
        elif space.metric == "cosine" or space.normalized:
            found = index.search(unit_length(themselves), 1)
            np.testing.assert_allclose(found.scores, 1.0, atol=2e-3 if dtype == "float16" else 1e-5)


@every_backend
@pytest.mark.parametrize("metric", ["cosine", "inner_product", "euclidean"])
class TestEdges:
    """Few rows, many wanted, none allowed."""

    def test_more_than_there_is_comes_back_padded(
        self, name: str, metric: Metric, clustered: Vectors, queries: Vectors, tmp_path: Path
    ) -> None:
        found = build(name, clustered[:30], Space(metric, normalized=False), tmp_path).search(queries[:3], 50)
        assert found.rows.shape == found.scores.shape == (3, 50)
        assert [sorted(line) for line in found.rows[:, :30].tolist()] == [list(range(30))] * 3
        assert (found.rows[:, 30:] == -1).all()
        assert (found.scores[:, 30:] == (np.inf if metric == "euclidean" else -np.inf)).all()

    @pytest.mark.parametrize("rows", [1, 2, 5])
    def test_a_handful_of_rows_is_an_index_too(
        self, name: str, metric: Metric, rows: int, clustered: Vectors, queries: Vectors, tmp_path: Path
    ) -> None:
        found = build(name, clustered[:rows], Space(metric, normalized=False), tmp_path).search(queries, 1)
        expected = reference(queries, clustered[:rows], metric)
        assert np.array_equal(found.rows, best(expected, metric, 1))

    def test_no_rows_give_no_hits(self, name: str, metric: Metric, queries: Vectors, tmp_path: Path) -> None:
        found = build(name, np.empty((0, 24), np.float32), Space(metric, normalized=False), tmp_path).search(queries, 3)
        assert (found.rows == -1).all()
        assert found.rows.shape == (len(queries), 3)

    def test_no_queries_give_no_answers(self, name: str, metric: Metric, clustered: Vectors, tmp_path: Path) -> None:
        index = build(name, clustered[:100], Space(metric, normalized=False), tmp_path)
        assert index.search(np.empty((0, 24), np.float32), 3).rows.shape == (0, 3)

    def test_a_selection_of_none_one_and_all(
        self, name: str, metric: Metric, clustered: Vectors, queries: Vectors, tmp_path: Path
    ) -> None:
        index = build(name, clustered, Space(metric, normalized=False), tmp_path)
        selected = np.zeros(len(clustered), np.bool_)
        assert (index.search(queries, 5, Selected(selected.copy())).rows == -1).all()
        selected[4711] = True
        one = index.search(queries, 5, Selected(selected.copy()))
        assert (one.rows[:, 0] == 4711).all()
        assert (one.rows[:, 1:] == -1).all()
        everything = index.search(queries, 5, Selected(np.ones(len(clustered), np.bool_)))
        assert_same(everything, index.search(queries, 5))

    def test_all_selected_rows_are_found_where_as_many_are_wanted(
        self, name: str, metric: Metric, clustered: Vectors, queries: Vectors, tmp_path: Path
    ) -> None:
        selected = np.arange(len(clustered)) % 2 == 0
        index = build(name, clustered, Space(metric, normalized=False), tmp_path)
        found = index.search(queries[:2], len(clustered), Selected(selected))
        chosen = np.flatnonzero(selected)
        assert np.array_equal(np.sort(found.rows[:, : len(chosen)], axis=1), np.tile(chosen, (2, 1)))
        assert (found.rows[:, len(chosen) :] == -1).all()

    def test_equal_rows_are_each_found_once_smaller_row_first(
        self, name: str, metric: Metric, clustered: Vectors, tmp_path: Path
    ) -> None:
        vectors = np.repeat(clustered[:200:10], 4, axis=0)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        found = build(name, vectors, Space(metric, normalized=True), tmp_path).search(vectors[::4].copy(), 4)
        assert np.array_equal(found.rows, np.arange(80).reshape(20, 4))
        assert (found.scores == found.scores[:, :1]).all()

    def test_a_zero_row_has_score_zero_and_never_nan(
        self, name: str, metric: Metric, clustered: Vectors, queries: Vectors, tmp_path: Path
    ) -> None:
        vectors = clustered[:50].copy()
        vectors[[7, 20]] = 0
        found = build(name, vectors, Space(metric, normalized=False), tmp_path).search(queries, 50)
        assert not np.isnan(found.scores).any()
        zero = np.isin(found.rows, [7, 20])
        assert zero.sum(axis=1).tolist() == [2] * len(queries)
        # The queries have unit length, and so does the distance to the origin.
        np.testing.assert_allclose(found.scores[zero], 1.0 if metric == "euclidean" else 0.0, atol=1e-6)


@every_backend
class TestConduct:
    """How an index behaves towards its neighbours."""

    @every_space
    def test_many_threads_at_once_get_the_answers_of_one(
        self, name: str, space: Space, clustered: Vectors, queries: Vectors, tmp_path: Path
    ) -> None:
        column = column_of(clustered[:3000], space, "float16")
        index = build(name, column, space, tmp_path)
        masks = [None, *(Selected(np.arange(len(column)) % 50 < share) for share in (45, 1))]
        jobs = [(queries[i : i + 4].copy(), masks[i % 3]) for i in range(0, 60)]
        with ThreadPoolExecutor(8) as threads:  # first, so that they meet in what is made lazily
            answers = list(threads.map(lambda job: index.search(job[0], 10, job[1]), jobs))
        for (asked, selected), answer in zip(jobs, answers, strict=True):
            assert_same(answer, index.search(asked, 10, selected))

    @every_space
    def test_building_twice_gives_the_same_bytes(
        self, name: str, space: Space, clustered: Vectors, tmp_path: Path
    ) -> None:
        backend = registry.backend(name)
        paths = [tmp_path / "first", tmp_path / "second"]
        made = [backend.build(clustered[:2000], space=space, path=p, parameters=backend.check({})) for p in paths]
        assert made[0] == made[1] == paths[0].exists() == paths[1].exists()
        if made[0]:
            assert paths[0].read_bytes() == paths[1].read_bytes()

    def test_building_is_silent_however_few_the_rows(
        self, name: str, clustered: Vectors, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        for rows in (1, 3, 40, 400):
            build(name, clustered[:rows], Space("cosine", normalized=False), tmp_path)
        assert capfd.readouterr() == ("", "")

    def test_the_column_is_never_changed(self, name: str, clustered: Vectors, queries: Vectors, tmp_path: Path) -> None:
        column = clustered.copy()
        build(name, column, Space("cosine", normalized=False), tmp_path).search(queries, 10)
        assert np.array_equal(column, clustered)

    def test_an_open_index_outlives_the_removal_of_its_file(
        self, name: str, clustered: Vectors, queries: Vectors, tmp_path: Path
    ) -> None:
        index = build(name, clustered, Space("euclidean", normalized=False), tmp_path)
        before = index.search(queries, 10)
        (tmp_path / f"{name}.index").unlink(missing_ok=True)
        assert_same(index.search(queries, 10), before)

    def test_columns_that_do_not_lie_row_by_row_are_read_right(
        self, name: str, clustered: Vectors, queries: Vectors, tmp_path: Path
    ) -> None:
        space = Space("euclidean", normalized=False)
        sideways = build(name, np.asfortranarray(clustered[:500]), space, tmp_path).search(queries, 10)
        assert_same(sideways, build(name, clustered[:500], space, tmp_path).search(queries, 10))

    @pytest.mark.parametrize(
        ("asked", "k", "selected"),
        [
            (np.zeros((2, 23), np.float32), 5, None),
            (np.zeros((2, 24), np.float64), 5, None),
            (np.zeros(24, np.float32), 5, None),
            (np.zeros((2, 24), np.float32), 0, None),
            (np.zeros((2, 24), np.float32), 5, Selected(np.ones(99, np.bool_))),
            (np.zeros((2, 24), np.float32), 5, Selected(np.ones(100, np.int64))),
        ],
    )
    def test_a_request_that_does_not_fit_is_refused(
        self, name: str, asked: Any, k: int, selected: Any, clustered: Vectors, tmp_path: Path
    ) -> None:
        index = build(name, clustered[:100], Space("euclidean", normalized=False), tmp_path)
        with pytest.raises(ValueError, match="must be"):
            index.search(asked, k, selected)

    def test_an_unknown_parameter_is_refused_by_name(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} has no parameter 'speed'"):
            registry.backend(name).check({"speed": 11})

    def test_checked_parameters_pass_the_check_again(self, name: str) -> None:
        backend = registry.backend(name)
        full = backend.check({})
        assert backend.check(full) == full

    @needs(SIFT)
    def test_real_vectors_are_found(self, name: str, tmp_path: Path) -> None:
        with np.load(SIFT) as sift:
            base, asked = sift["base"].astype(np.float32), sift["queries"].astype(np.float32)
        found = build(name, base, Space("euclidean", normalized=False), tmp_path).search(asked, 10)
        assert_right(name, found, asked, base, "euclidean", 10, recall=0.98)


def assert_right(
    name: str,
    found: Found,
    queries: Vectors,
    column: Stored,
    metric: Metric,
    k: int,
    selected: Mask | None = None,
    recall: float = 0.95,
) -> None:
    """Scores are those of the rows, best first; and the rows are the best, or `recall` of them where approximate."""
    scores = reference(queries, column, metric)
    expected = best(scores, metric, k, selected)
    assert found.rows.dtype == np.int64
    assert found.scores.dtype == np.float32
    assert (found.rows >= 0).all()
    assert selected is None or selected[found.rows].all()
    assert all(len(set(line)) == k for line in found.rows.tolist())
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, found.rows, 1), rtol=1e-5, atol=1e-5)
    steps = np.diff(found.scores, axis=1)
    assert (steps >= 0).all() if metric == "euclidean" else (steps <= 0).all()
    if name in EXACT:
        # Rows may differ from the reference only where their scores are equal.
        np.testing.assert_allclose(found.scores, np.take_along_axis(scores, expected, 1), rtol=1e-5, atol=1e-5)
    shared = [len(set(a) & set(b)) for a, b in zip(found.rows.tolist(), expected.tolist(), strict=True)]
    assert np.mean(shared) / k >= (0.999 if name in EXACT else recall)


def assert_same(one: Found, other: Found) -> None:
    assert np.array_equal(one.rows, other.rows)
    assert np.array_equal(one.scores, other.scores)
