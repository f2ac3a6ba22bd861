import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.evaluation import cross_test, judge_queries
from models.flips import flips


def versions(count: int = 3) -> tuple[list[np.ndarray], np.ndarray]:
    """Embeddings of the same items by models that see ever more of them, and labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 6
    items = rng.normal(size=(6, 8))[labels] + 0.5 * rng.normal(size=(60, 8))
    return [items * (np.arange(8) < 2 + 2 * version) for version in range(count)], labels


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
