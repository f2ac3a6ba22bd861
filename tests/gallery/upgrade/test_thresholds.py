"""A threshold in another space, against counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gallery.arrays import Metric
from gallery.upgrade.thresholds import Scored, carried_over

numbers = st.lists(st.integers(-20, 20).map(float), min_size=1, max_size=30)


def scored(metric: Metric, scores: Any, relevant: Any = None, *, wanted: int = 0) -> Scored:
    """Hits; their relevance is known where it is given."""
    hits = np.asarray(scores, np.float64)
    known = np.full(len(hits), relevant is not None)
    return Scored(metric, hits, np.asarray(relevant if relevant is not None else known, np.bool_), known, wanted)


def test_the_share_of_accepted_hits_is_kept_from_similarity_to_distance() -> None:
    before = scored("cosine", [0.9, 0.8, 0.7, 0.6])
    told = carried_over(0.75, before, scored("euclidean", [4, 3, 2, 1]))
    assert (told["after"], told["accepted_before"], told["accepted_after"]) == (2.5, 2, 2)
    assert (told["hits_before"], told["hits_after"], told["reason"]) == (4, 4, None)
    assert told["same_precision"] is told["same_recall"] is None


def test_a_threshold_that_keeps_nothing_or_everything_is_only_a_bound() -> None:
    before, after = scored("cosine", [0.5, 0.4]), scored("cosine", [0.3, 0.2])
    nothing, everything = carried_over(0.9, before, after), carried_over(0.1, before, after)
    assert (nothing["accepted_after"], everything["accepted_after"]) == (0, 2)
    assert nothing["after"] > 0.3
    assert everything["after"] == pytest.approx(0.2)
    assert "only a bound" in nothing["reason"]
    assert "only a bound" in everything["reason"]


def test_precision_and_recall_are_kept_where_relevance_is_known() -> None:
    before = scored("cosine", [0.9, 0.8, 0.7, 0.6], [1, 1, 0, 0], wanted=4)
    told = carried_over(0.65, before, scored("cosine", [9, 8, 7, 6], [1, 0, 1, 1], wanted=4))
    assert (told["precision_before"], told["recall_before"]) == (pytest.approx(2 / 3), 0.5)
    assert told["same_precision"] == 6  # three of four are right
    assert told["same_recall"] == 7  # two of four are found


def test_a_precision_that_is_out_of_reach_is_null() -> None:
    before = scored("cosine", [0.9], [1], wanted=1)
    told = carried_over(0.5, before, scored("cosine", [9, 8], [0, 1], wanted=1))
    assert told["same_precision"] is None
    assert told["same_recall"] == 8


@given(before=numbers, after=numbers, threshold=st.integers(-21, 21))
def test_what_is_accepted_is_counted_and_near_the_same_share(
    before: list[float], after: list[float], threshold: int
) -> None:
    told = carried_over(float(threshold), scored("inner_product", before), scored("euclidean", after))
    share = np.mean(np.array(before) >= threshold)
    assert told["accepted_before"] == sum(score >= threshold for score in before)
    assert told["accepted_after"] == sum(score <= told["after"] for score in after)
    ties = max(after.count(score) for score in after)
    assert abs(told["accepted_after"] - share * len(after)) <= 0.5 + ties


def test_probes_that_find_nothing_tell_nothing() -> None:
    told = carried_over(0.5, scored("cosine", []), scored("cosine", []))
    assert told["after"] is None
    assert told["reason"]
