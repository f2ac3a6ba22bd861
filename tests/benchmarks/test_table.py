"""The table's logic: medians, bars, and what the run as a whole says."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.table import (
    Group,
    Pair,
    alone,
    at_least,
    at_most,
    cells,
    compared,
    counted,
    document,
    exit_code,
    markdown,
)


def test_a_ratio_is_the_median_of_the_rounds_ratios_so_that_one_bad_round_decides_nothing() -> None:
    line = compared("p50", [Pair(1.0, 1.0), Pair(30.0, 20.0), Pair(900.0, 3.0)], at_most(1.5))
    assert (line.ratio, line.least, line.largest, line.rounds) == (1.5, 1.0, 300.0, 3)
    assert not line.missed


def test_a_moment_that_slows_both_sides_of_a_round_changes_no_ratio() -> None:
    calm = [Pair(2.0, 1.0), Pair(4.0, 2.0), Pair(2.0, 1.0)]
    slowed = [Pair(2.0, 1.0), Pair(400.0, 200.0), Pair(200.0, 100.0)]
    assert compared("p50", calm).ratio == compared("p50", slowed).ratio == 2.0


@pytest.mark.parametrize(
    ("bar", "ratio", "missed"),
    [
        (at_most(1.4), 1.4, False),
        (at_most(1.4), 1.41, True),
        (at_least(0.8), 0.8, False),
        (at_least(0.8), 0.79, True),
        (at_most(1.4), math.nan, True),
        (at_least(0.8), math.nan, True),
        (None, 99.0, False),
    ],
)
def test_a_bar_is_missed_on_its_wrong_side_and_by_what_is_no_number(bar, ratio, missed) -> None:  # type: ignore[no-untyped-def]
    assert compared("x", [Pair(ratio, 1.0)], bar).missed is missed


def test_a_comparison_with_nothing_misses_its_bar() -> None:
    assert compared("x", [Pair(1.0, 0.0)], at_most(2.0)).missed


def test_a_count_is_judged_by_its_worst_round() -> None:
    assert counted("failed", [0, 0, 1], at_most(0)).missed
    assert not counted("failed", [0, 0], at_most(0)).missed
    assert counted("recall", [0.99, 0.5], at_least(0.98)).missed


def test_a_figure_that_stands_alone_is_judged_by_its_median() -> None:
    line = alone("ready", [0.1, 9.0, 0.2], at_most(0.5), unit="s")
    assert not line.missed
    assert cells(line) == ("ready", "0.2 s", "", "", "0.1 to 9 (3)", "<= 0.5", "holds")


def test_nothing_measured_is_no_line() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        compared("x", [])


def test_a_missed_bar_and_a_failed_group_exit_non_zero_and_a_skipped_one_does_not() -> None:
    held = Group("held", (compared("x", [Pair(1, 1)], at_most(1)),))
    missed = Group("missed", (compared("x", [Pair(2, 1)], at_most(1)),))
    assert exit_code([held, Group("skipped", skipped="no images")]) == 0
    assert exit_code([held, missed]) == 1
    assert exit_code([held, Group("failed", failed="no server")]) == 1
    assert exit_code([Group("half", held.lines, failed="it stopped after one line")]) == 1


def test_the_tables_show_both_figures_the_bar_and_the_verdict() -> None:
    line = compared("p50", [Pair(0.3, 0.2)], at_most(1.4), unit="ms", note="recall 0.99")
    assert cells(line) == ("p50 (recall 0.99)", "0.3 ms", "0.2 ms", "1.5", "1.5 to 1.5 (1)", "<= 1.4", "MISSED")
    text = markdown([Group("http", (line,)), Group("images", skipped="no --root")])
    assert "| p50 (recall 0.99) | 0.3 ms | 0.2 ms | 1.5 |" in text
    assert "Not measured: no --root" in text


def test_the_document_is_json_even_where_there_is_nothing_to_compare_with() -> None:
    (group,) = document([Group("during", (counted("failed", [0], at_most(0)),))])
    (line,) = json.loads(json.dumps(group, allow_nan=False))["lines"]
    assert line["bar"] == "<= 0"
    assert line["against"] is None
    assert line["missed"] is False
