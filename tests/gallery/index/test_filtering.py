"""How some rows of a segment are searched is decided by three numbers."""

from __future__ import annotations

import pytest

from gallery.index._filtering import How, how, pool


@pytest.mark.parametrize(
    ("selected", "with_lists", "without"),
    [
        (1, How.EXACT, How.EXACT),
        (10_000, How.EXACT, How.EXACT),
        (10_001, How.LISTS, How.EXACT),
        (24_999, How.LISTS, How.SIEVE),
        (25_000, How.SIEVE, How.SIEVE),
        (99_999, How.SIEVE, How.SIEVE),
        (100_000, How.SIEVE, How.SIEVE),
    ],
)
def test_the_fewer_rows_are_selected_the_nearer_a_search_is_to_comparing_them_all(
    selected: int, with_lists: How, without: How
) -> None:
    assert how(100_000, selected, 10, by_lists=True) is with_lists
    assert how(100_000, selected, 10, by_lists=False) is without


@pytest.mark.parametrize("by_lists", [True, False])
def test_where_nearly_as_many_are_wanted_as_there_are_all_are_compared(by_lists: bool) -> None:
    for selected in (1, 10, 400, 999):
        assert how(1000, selected, 1000, by_lists=by_lists) is How.EXACT


@pytest.mark.parametrize("k", [1, 10, 1000])
@pytest.mark.parametrize("by_lists", [True, False])
def test_no_way_but_comparison_is_left_with_fewer_rows_than_are_wanted(k: int, by_lists: bool) -> None:
    """A search that reads lists, or drops what it found, may count on there being `k` rows to find."""
    assert all(how(10**6, selected, k, by_lists=by_lists) is How.EXACT for selected in range(1, k + 1))


def test_more_is_proposed_the_more_will_be_dropped() -> None:
    assert [pool(10, effort) for effort in (1, 1.5, 10)] == [10, 38, 347]
