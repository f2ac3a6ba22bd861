"""Measures of answers, against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gallery.upgrade.measures import K, judge, measures

ITEMS = [f"i{n}" for n in range(14)]
answers = st.lists(st.sampled_from(ITEMS), unique=True, max_size=K)
wanted = st.sets(st.sampled_from(ITEMS), min_size=1)


@given(found=answers, relevant=wanted)
def test_a_probe_is_judged_by_the_formulas(found: list[str], relevant: set[str]) -> None:
    hits = np.array([item in relevant for item in found] + [False] * (K - len(found)))
    precision_at = np.cumsum(hits) / np.arange(1, K + 1)
    judged = judge(found, relevant)
    assert judged.right == hits[0]
    assert judged.recall == pytest.approx(hits.sum() / min(K, len(relevant)))
    assert judged.precision == pytest.approx((precision_at * hits).sum() / min(K, len(relevant)))
    assert 0 <= judged.precision <= judged.recall <= 1


def test_measures_are_means_over_the_probes_whose_relevance_is_known() -> None:
    found = [["a", "b"], ["c", "a"], ["x"]]
    told = measures(found, [["a"], ["a"], []], before=[["a", "b"], ["a", "c"], ["y"]])
    assert told == {
        "probes": 3,
        "judged": 2,
        "k": K,
        "cmc1": 0.5,
        "recall_at_10": 1.0,
        "map": 0.75,
        "overlap_at_10": pytest.approx(2 / 3),
        "negative_flips": 1,
    }


def test_without_relevance_there_is_the_overlap_alone() -> None:
    told = measures([["a"], []], [[], []], before=[["a"], []])
    assert (told["overlap_at_10"], told["cmc1"], told["negative_flips"], told["judged"]) == (1.0, None, None, 0)
    assert measures([["a"]], [["a"]])["overlap_at_10"] is None


def test_a_probe_that_becomes_right_is_no_negative_flip() -> None:
    assert measures([["a"]], [["a"]], before=[["b"]])["negative_flips"] == 0
