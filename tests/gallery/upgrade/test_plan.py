"""In which order segments are transformed."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gallery.upgrade.plan import Candidate, Order, ordered

FEW = st.sampled_from([-math.inf, -2.5, 0.0, 0.5, 3.0])  # so that equal ones are common
CANDIDATES = st.lists(
    st.builds(Candidate, st.integers(1, 50), st.integers(1, 1000), uncertainty=FEW, hits=st.integers(0, 3)),
    unique_by=lambda candidate: candidate.segment_id,
)


def priority(candidate: Candidate, order: Order) -> float:
    """What an order compares; everything is the same as it is stored."""
    return {Order.STORED: 0.0, Order.UNCERTAINTY: candidate.uncertainty, Order.MOST_SEARCHED: candidate.hits}[order]


@given(candidates=CANDIDATES, order=st.sampled_from(Order))
def test_the_work_is_every_segment_once_the_first_first_and_equal_ones_as_they_are_stored(
    candidates: list[Candidate], order: Order
) -> None:
    work = ordered(candidates, order)
    assert sorted(work) == sorted(candidates)
    for before, after in itertools.pairwise(work):
        first, second = priority(before, order), priority(after, order)
        assert first > second or (first == second and before.segment_id < after.segment_id)


@given(candidates=CANDIDATES, order=st.sampled_from(Order), data=st.data())
def test_the_work_does_not_depend_on_how_it_was_listed(
    candidates: list[Candidate], order: Order, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(candidates))
    assert ordered(shuffled, order) == ordered(candidates, order)
    assert ordered(ordered(candidates, order), order) == ordered(candidates, order)


@pytest.mark.parametrize("order", Order)
def test_without_hits_and_predictions_every_order_is_that_of_storage(order: Order) -> None:
    candidates = [Candidate(segment, rows=10 * segment) for segment in (3, 1, 2)]
    assert [each.segment_id for each in ordered(candidates, order)] == [1, 2, 3]
