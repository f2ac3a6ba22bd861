from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.compatibility import (
    Comparison,
    average_accuracy,
    average_compatibility,
    compatibility_matrix,
    flips,
)
from models.evaluation import cross_test, judge_queries

#: CMC-1 of ImageNet 500 -> 1k without side-information, as FCT's repository (2023) has it; naive: by chance
IMAGENET = Comparison(old_old=46.4, naive=0.1, adapted=61.8, new_new=68.4)
FIGURE = st.floats(0.01, 1)


def versions(count: int = 3) -> tuple[list[np.ndarray], np.ndarray]:
    """Embeddings of the same items by models that see ever more of them, and labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 6
    items = rng.normal(size=(6, 8))[labels] + 0.5 * rng.normal(size=(60, 8))
    return [items * (np.arange(8) < 2 + 2 * version) for version in range(count)], labels


def test_the_matrix_holds_each_versions_queries_against_the_galleries_of_its_past() -> None:
    models, labels = versions()
    matrix = compatibility_matrix(3, lambda query, gallery: cross_test(models[query], models[gallery], labels).map)
    assert (matrix[np.triu_indices(3, 1)] == 0).all()
    for query in range(3):
        for gallery in range(query + 1):
            assert matrix[query, gallery] == cross_test(models[query], models[gallery], labels).map


def test_identical_models_are_interchangeable_and_so_not_compatible() -> None:
    models, labels = versions(1)
    matrix = compatibility_matrix(3, lambda query, gallery: cross_test(models[0], models[0], labels).cmc1)
    assert len(set(matrix[np.tril_indices(3)])) == 1
    assert average_compatibility(matrix) == 0
    assert average_accuracy(matrix) == pytest.approx(matrix[0, 0])


def test_compatibility_is_the_share_of_pairs_that_beat_the_old_model_and_a_tie_does_not() -> None:
    matrix = np.array([[0.5, 0.0, 0.0], [0.6, 0.7, 0.0], [0.5, 0.4, 0.9]])  # better, a tie, worse
    assert average_compatibility(matrix) == pytest.approx(1 / 3)


def test_a_zero_inside_the_triangle_counts() -> None:
    matrix = np.array([[0.6, 0.0], [0.0, 0.9]])
    assert average_accuracy(matrix) == pytest.approx((0.6 + 0.0 + 0.9) / 3)


@given(arrays(np.float64, (4, 4), elements=st.floats(0, 1)))
def test_what_no_pair_stands_for_changes_nothing(values: np.ndarray) -> None:
    lower = np.tril(values)
    assert average_compatibility(values) == average_compatibility(lower)
    assert average_accuracy(values) == average_accuracy(lower)
    pairs = [(t, k) for t in range(4) for k in range(t)]
    assert average_compatibility(values) == pytest.approx(
        2 / (4 * 3) * sum(values[t, k] > values[k, k] for t, k in pairs)
    )
    assert average_accuracy(values) == pytest.approx(2 / (4 * 5) * lower.sum())


def test_matrices_without_a_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 versions"):
        average_compatibility(np.ones((1, 1)))
    with pytest.raises(ValueError, match="must be square"):
        average_accuracy(np.ones((2, 3)))


def test_the_published_figures_give_their_gains() -> None:
    assert IMAGENET.compatible
    assert IMAGENET.update_gain == pytest.approx(0.7)
    assert IMAGENET.retention == pytest.approx(0.9035, abs=1e-4)
    assert IMAGENET.reindex_gain == pytest.approx(1.474, abs=1e-3)


@given(old_old=FIGURE, adapted=FIGURE, new_new=FIGURE)
def test_an_upgrade_breaks_even_where_what_is_kept_outweighs_what_is_gained(
    old_old: float, adapted: float, new_new: float
) -> None:
    comparison = Comparison(old_old=old_old, naive=0.0, adapted=adapted, new_new=new_new)
    product = comparison.retention * comparison.reindex_gain
    if abs(product - 1) > 1e-9:  # nearer than rounding, either answer is right
        assert comparison.compatible == (product > 1)


def test_staying_gains_nothing_and_re_embedding_everything() -> None:
    stayed, embedded = replace(IMAGENET, adapted=46.4), replace(IMAGENET, adapted=68.4)
    assert (stayed.compatible, stayed.update_gain) == (False, 0)
    assert (embedded.compatible, embedded.update_gain, embedded.retention) == (True, 1, 1)


def test_flips_are_counted_in_both_directions() -> None:
    before, after = np.array([0, 0, 3, 7, 0, np.nan]), np.array([0, 2, 0, 9, 1, np.nan])
    first = flips(before, after)
    assert (first.positive, first.negative, first.queries) == (1 / 5, 2 / 5, 5)
    second = flips(before, after, k=3)
    assert (second.positive, second.negative, second.queries) == (1 / 5, 0, 5)


@given(arrays(np.int64, (2, 40), elements=st.integers(0, 12)), st.integers(1, 10))
def test_what_is_gained_is_what_rose_less_what_fell(places: np.ndarray, k: int) -> None:
    before, after = places
    found = flips(before, after, k=k)
    assert found.gain == pytest.approx((after < k).mean() - (before < k).mean())
    back = flips(after, before, k=k)
    assert (back.positive, back.negative) == (found.negative, found.positive)


def test_the_flips_of_two_searches_add_up_to_the_difference_of_their_evaluations() -> None:
    models, labels = versions(2)
    labels = labels.copy()
    labels[3] = 99  # a query with nothing to find
    old, new = (judge_queries(each, each, labels, labels, leave_one_out=True)[:, 0] for each in models)
    for k, name in ((1, "cmc1"), (5, "cmc5")):
        found = flips(old, new, k=k)
        rise = getattr(cross_test(models[1], models[1], labels), name) - getattr(
            cross_test(models[0], models[0], labels), name
        )
        assert found.queries == 59
        assert found.gain == pytest.approx(rise)
    assert flips(old, new).positive > 0


def test_flips_of_other_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="the same queries"):
        flips(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="the same queries"):
        flips(np.array([0.0, np.nan]), np.array([0.0, 1.0]))


def test_without_a_query_to_count_flips_are_undefined() -> None:
    nothing = flips(np.full(3, np.nan), np.full(3, np.nan))
    assert nothing.queries == 0
    assert np.isnan(nothing.positive)
    assert np.isnan(nothing.gain)
