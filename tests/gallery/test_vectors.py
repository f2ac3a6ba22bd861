"""The one door for vectors."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from gallery import errors
from gallery.arrays import Metric
from gallery.spaces import EmbeddingModel
from gallery.vectors import accept, accept_side, as_query


def model(metric: Metric = "euclidean", *, normalized: bool = False, dimension: int = 3) -> EmbeddingModel:
    """A model."""
    return EmbeddingModel(1, "m", dimension, metric, normalized, None, None, None, datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_a_number_that_float32_cannot_hold_is_refused_with_its_row(bad: float) -> None:
    vectors = np.ones((4, 3))
    vectors[2, 1] = bad
    with pytest.raises(errors.InvalidVector, match="vector 2 holds NaN, infinity") as refused:
        accept(vectors, model(), pointer="/items/{row}/embedding")
    assert refused.value.pointer == "/items/2/embedding"
    with pytest.raises(errors.InvalidVector):
        accept_side(vectors, 3, pointer="{row}")


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (3,), (2, 3, 1), (1, 0)])
def test_another_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(errors.DimensionMismatch, match="have dimension 3"):
        accept(np.ones(shape), model(), pointer="")
    with pytest.raises(errors.DimensionMismatch):
        accept_side(np.ones(shape), 3, pointer="")


@pytest.mark.parametrize(
    ("metric", "normalized", "refused"),
    [("cosine", False, True), ("cosine", True, True), ("euclidean", True, True), ("inner_product", True, True),
     ("euclidean", False, False), ("inner_product", False, False)],
)  # fmt: skip
def test_a_zero_vector_is_refused_where_it_has_no_direction(metric: Metric, normalized: bool, refused: bool) -> None:
    vectors = np.array([[1, 0, 0], [0, 0, 0]])
    if not refused:
        assert np.array_equal(accept(vectors, model(metric, normalized=normalized), pointer=""), vectors)
        return
    with pytest.raises(errors.InvalidVector, match="vector 1 is zero"):
        accept(vectors, model(metric, normalized=normalized), pointer="")


@pytest.mark.parametrize("metric", ["euclidean", "inner_product", "cosine"])
def test_a_vector_whose_scores_would_be_infinite_is_refused_where_its_length_counts(metric: Metric) -> None:
    vectors = np.array([[1, 0, 0], [0, 2e19, 0], [-9e18, 0, 0]])
    assert accept(vectors[[0, 2]], model(metric), pointer="").shape == (2, 3)
    if metric == "cosine":
        assert accept(vectors, model(metric), pointer="").shape == (3, 3)
        return
    for some, row in ((vectors, 1), (vectors[1:2], 0)):
        with pytest.raises(errors.InvalidVector, match=f"vector {row} is longer than 9e\\+18") as refused:
            accept(some, model(metric), pointer="/items/{row}/embedding")
        assert refused.value.pointer == f"/items/{row}/embedding"


def test_vectors_of_a_normalized_model_get_unit_length_and_those_that_have_it_keep_their_bytes() -> None:
    unit = np.array([[0.6, 0.8, 0.0]], np.float32)
    accepted = accept(np.vstack([unit, 5 * unit, [[1e-30, 0, 0]]]), model("cosine", normalized=True), pointer="")
    assert accepted[0].tobytes() == unit[0].tobytes()
    np.testing.assert_allclose(np.linalg.norm(accepted, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    "given", [np.ones((2, 3), np.int64), np.ones((2, 3), np.float64), np.asfortranarray(np.ones((2, 3)))]
)
def test_what_is_accepted_is_contiguous_float32(given: Any) -> None:
    accepted = accept(given, model(), pointer="")
    assert accepted.dtype == np.float32
    assert accepted.flags.c_contiguous


def test_no_vectors_are_accepted_as_none() -> None:
    assert accept(np.empty((0, 3)), model("cosine", normalized=True), pointer="").shape == (0, 3)


def test_only_cosine_without_normalized_vectors_changes_a_query() -> None:
    query = np.array([[3, 4, 0]], np.float32)
    np.testing.assert_allclose(as_query(query, model("cosine")), query / 5, rtol=1e-6)
    assert as_query(query, model("euclidean")) is query
    assert as_query(query, model("cosine", normalized=True)) is query
