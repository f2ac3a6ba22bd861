"""What a gate asks for, and by how much that is missed."""

from __future__ import annotations

import pytest

from gallery.upgrade import gate
from gallery.upgrade.measures import measures

BEFORE = {"cmc1": 0.6, "recall_at_10": 0.5, "map": 0.4, "negative_flips": None, "overlap_at_10": None}
AFTER = {"cmc1": 0.5, "recall_at_10": 0.5, "map": 0.45, "negative_flips": 7, "overlap_at_10": 0.3}


@pytest.mark.parametrize(
    ("limit", "met", "missed", "by"),
    [
        ("min_cmc1", 0.5, 0.51, "0.0100 short"),
        ("min_recall_at_10", 0.5, 0.75, "0.2500 short"),
        ("min_map", 0.45, 0.5, "0.0500 short"),
        ("min_overlap_at_10", 0.3, 0.4, "0.1000 short"),
        ("max_negative_flips", 7, 6, "1 too many"),
        ("max_cmc1_drop", 0.1, 0.09, "a drop of 0.1000"),
        ("max_recall_drop", 0.0, -0.1, "a drop of 0.0000"),
        ("max_map_drop", 0.0, -0.1, "a drop of -0.0500"),
    ],
)
def test_each_limit_is_met_or_missed_by_so_much(limit: str, met: float, missed: float, by: str) -> None:
    assert gate.shortfalls({limit: met}, BEFORE, AFTER, gate.NOW) == []
    (found,) = gate.shortfalls({limit: missed}, BEFORE, AFTER, gate.NOW)
    assert found.limit == limit
    assert by in found.detail
    assert gate.LIMITS[limit].measure in found.detail
    assert (" of at least " if limit.startswith("min_") else " of at most ") in found.detail


def test_a_limit_that_is_met_exactly_is_met_however_the_mean_was_rounded() -> None:
    of_ten = [[str(hit) for hit in range(8)] for _ in range(100)]
    after = measures(of_ten, [[str(item) for item in range(10)]] * 100)
    assert gate.shortfalls({"min_recall_at_10": 0.8}, None, after, gate.NOW) == []
    assert gate.shortfalls({"min_recall_at_10": 0.1 + 0.2}, None, {**after, "recall_at_10": 0.3}, gate.NOW) == []


def test_every_limit_that_is_missed_is_told() -> None:
    found = gate.shortfalls({"min_cmc1": 0.9, "min_map": 0.1, "max_negative_flips": 0}, BEFORE, AFTER, gate.EXPECTED)
    assert [each.limit for each in found] == ["min_cmc1", "max_negative_flips"]
    assert gate.in_words(found).count("expected after the upgrade") == 2


@pytest.mark.parametrize("limit", gate.LIMITS)
def test_what_was_not_measured_is_not_met(limit: str) -> None:
    (found,) = gate.shortfalls({limit: 0}, None, None, gate.EXPECTED)
    assert "no probes" in found.detail


def test_a_gate_that_closed_stops_until_a_person_goes_on_and_then_only_warns() -> None:
    missed = gate.shortfalls({"min_cmc1": 0.9}, BEFORE, AFTER, gate.NOW)
    open_ = gate.judged({"now": AFTER}, [], "2026-01-01T00:00:00Z")
    assert (gate.closed(open_), gate.stops(open_), gate.waived(open_, "then")) == (None, False, open_)
    closed = gate.judged(open_, missed, "2026-01-02T00:00:00Z")
    assert gate.stops(closed)
    again = gate.judged(closed, missed, "2026-01-03T00:00:00Z")
    assert (gate.closed(again) or {})["since"] == "2026-01-02T00:00:00Z"
    decided = gate.judged(gate.waived(again, "2026-01-04T00:00:00Z"), missed, "2026-01-05T00:00:00Z")
    assert gate.closed(decided)
    assert not gate.stops(decided)
    assert decided["now"] == AFTER
