"""When the next segment may be leased."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gallery.upgrade.throttle import (
    SEARCH_P99,
    after_change,
    after_segment,
    before_segment,
    believed,
    held_back,
    is_due,
    predicted_seconds,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def later(seconds: float) -> datetime:
    """A moment after NOW."""
    return NOW + timedelta(seconds=seconds)


@given(rows=st.lists(st.integers(1, 10_000), min_size=1, max_size=20), rate=st.integers(1, 5000))
def test_leases_never_exceed_the_rate_however_many_workers_share_it(rows: list[int], rate: int) -> None:
    moment, not_before, leased = NOW, None, 0
    for count in rows:
        not_before = before_segment({"items_per_second": rate}, count, not_before, moment)
        assert not_before is not None
        moment, leased = not_before, leased + count
        assert (moment - NOW).total_seconds() == pytest.approx(leased / rate, abs=1e-4)


@given(number=st.floats(min_value=5e-324, max_value=0.99), rows=st.integers(1, 10**9), seconds=st.floats(0, 1e9))
def test_however_small_a_limit_is_there_is_a_moment_for_it(number: float, rows: int, seconds: float) -> None:
    for moment in (
        before_segment({"items_per_second": number}, rows, None, NOW),
        after_segment({"duty_cycle": number}, seconds, None, NOW),
    ):
        assert moment is not None
        assert NOW <= moment <= NOW + timedelta(days=3650)


def test_the_first_segment_waits_for_its_items_too() -> None:
    assert not is_due({"items_per_second": 10}, None)
    assert is_due({"items_per_second": 10}, later(0))
    assert is_due({"duty_cycle": 0.1}, None)


def test_time_that_passed_unused_is_not_saved_up_but_for_a_second_by_which_a_worker_may_be_late() -> None:
    assert before_segment({"items_per_second": 10}, 20, later(-100), NOW) == later(1)
    assert before_segment({"items_per_second": 10}, 20, later(-0.5), NOW) == later(1.5)
    assert after_segment({"duty_cycle": 0.25}, 2, later(-100), NOW) == later(5)
    assert after_segment({"duty_cycle": 0.25}, 2, later(-2.5), NOW) == later(5.5)


@given(
    late=st.lists(st.floats(0, 0.9), min_size=1, max_size=20),
    rows=st.lists(st.integers(1, 1000), min_size=20, max_size=20),
    rate=st.integers(1, 5000),
)
def test_a_late_worker_catches_up_and_never_exceeds_the_rate(late: list[float], rows: list[int], rate: int) -> None:
    throttle, leased = {"items_per_second": rate}, 0
    not_before = before_segment(throttle, rows[0], None, NOW)
    for seconds, count, following in zip(late, rows, rows[1:], strict=False):
        assert not_before is not None
        leased += count
        moment, due = not_before + timedelta(seconds=seconds), (not_before - NOW).total_seconds()
        assert due == pytest.approx(leased / rate, abs=1e-4)
        not_before = before_segment(throttle, following, not_before, moment)


@pytest.mark.parametrize(
    ("throttle", "seconds"), [({"items_per_second": 200}, 2.0), ({"duty_cycle": 0.5}, 4.0)], ids=["rate", "duty cycle"]
)
def test_a_worker_that_looks_twice_a_second_takes_no_longer_than_the_limit_asks_for(
    throttle: dict[str, float], seconds: float
) -> None:
    """Of 40 segments with 10 items that take 0.05 s, it does at each look those that are due."""
    not_before, left, now = before_segment(throttle, 10, None, NOW), 40, 0.0
    while left:
        now = math.floor(now / 0.5 + 1) * 0.5  # the next look
        while left and (not_before is None or later(now) >= not_before):
            not_before = before_segment(throttle, 10, not_before, later(now))
            now, left = now + 0.05, left - 1
            not_before = after_segment(throttle, 0.05, not_before, later(now))
    assert seconds - 0.2 <= now <= seconds + 1


def test_a_prediction_knows_what_each_segment_takes_besides_its_items() -> None:
    assert predicted_seconds({}, 1000, 1, 1e9) < predicted_seconds({}, 1000, 100, 1e9) / 50
    assert predicted_seconds({"duty_cycle": 0.5}, 1000, 100, 1e9) == 2 * predicted_seconds({}, 1000, 100, 1e9)
    assert predicted_seconds({"items_per_second": 10}, 1000, 1, 1e9) == 100
    assert predicted_seconds({}, 1000, 1, 10) == pytest.approx(100, abs=1)


def test_whatever_comes_after_the_last_segment_has_not_waited_yet() -> None:
    throttle = {"items_per_second": 10, "duty_cycle": 0.5}
    not_before = before_segment(throttle, None, later(-100), NOW)
    assert not is_due(throttle, not_before)
    assert not is_due(throttle, after_segment(throttle, 2, not_before, NOW))


def test_a_higher_rate_is_felt_at_once_and_a_change_never_makes_a_wait_longer() -> None:
    slow, fast = {"items_per_second": 1}, {"items_per_second": 100}
    assert after_change(slow, fast, 1000, later(500), NOW) == later(10)
    assert after_change(fast, slow, 1000, later(5), NOW) == later(5)
    assert after_change(slow, {**slow, "max_search_p99_ms": 5}, 1000, later(500), NOW) == later(500)
    assert after_change(slow, {}, 1000, later(500), NOW) is None
    assert after_change({"duty_cycle": 0.1}, {"duty_cycle": 0.9}, 1000, later(500), NOW) is None
    assert after_change({}, slow, 1000, None, NOW) == later(1000)


def test_a_duty_cycle_rests_in_proportion_to_the_work() -> None:
    assert after_segment({"duty_cycle": 0.25}, 2, None, NOW) == later(6)
    assert after_segment({"duty_cycle": 0.25}, 2, later(60), NOW) == later(60)


@pytest.mark.parametrize("throttle", [{}, {"items_per_second": None}, {"duty_cycle": 1.0}, {"max_search_p99_ms": 5}])
def test_what_does_not_limit_the_speed_leaves_the_moment_alone(throttle: dict[str, float]) -> None:
    for before in (None, later(3)):
        assert before_segment(throttle, 10, before, NOW) == before
        assert after_segment(throttle, 10, before, NOW) == before


@pytest.mark.parametrize(
    ("set_at", "still"),
    [(None, True), (later(-5), True), (later(50), True), (later(70), False), (later(7200), False)],
    ids=["nobody noted when", "a moment ago", "by a host whose clock is ahead", "the clock went back", "by hours"],
)
def test_a_wait_that_was_set_in_the_future_is_not_believed(set_at: datetime | None, still: bool) -> None:
    assert believed(later(9000), set_at, NOW) == (later(9000) if still else None)
    assert believed(None, set_at, NOW) is None


@pytest.mark.parametrize(
    ("throttle", "not_before", "p99", "reason"),
    [
        ({}, None, None, None),
        ({}, later(-1), None, None),
        ({"items_per_second": 5}, later(2), None, "items_per_second"),
        ({"duty_cycle": 0.5}, later(2), None, "duty_cycle"),
        ({"max_search_p99_ms": 10}, None, None, None),
        ({"max_search_p99_ms": 10}, None, 10.0, None),
        ({"max_search_p99_ms": 10}, None, 10.1, SEARCH_P99),
        ({"max_search_p99_ms": 10, "items_per_second": 5}, later(2), 50.0, SEARCH_P99),
    ],
)
def test_an_upgrade_is_held_back_with_a_reason(
    throttle: dict[str, float], not_before: datetime | None, p99: float | None, reason: str | None
) -> None:
    held = held_back(throttle, not_before, NOW, p99)
    assert (held[0] if held else None) == reason
    assert held is None or held[1]
