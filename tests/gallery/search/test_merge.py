"""The best of several parts, against sorting everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gallery.arrays import Metric
from gallery.search.merge import Part, merge, single


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "euclidean"])
@given(data=st.data(), k=st.integers(1, 12), queries=st.integers(1, 3))
def test_the_merge_is_a_stable_sort_of_everything(metric: Metric, data: Any, k: int, queries: int) -> None:
    parts, everything = [], [[] for _ in range(queries)]
    for segment in range(data.draw(st.integers(0, 4))):
        width = data.draw(st.integers(0, 5))
        drawn = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=queries * width, max_size=queries * width)
        scores = np.array(data.draw(drawn), np.float32).reshape(queries, width)
        found = data.draw(st.integers(0, width))
        rows = np.tile(np.where(np.arange(width) < found, np.arange(width), -1), (queries, 1))
        parts.append(single(segment, scores, rows))
        for query in range(queries):
            everything[query] += [
                (scores[query, row] if metric == "euclidean" else -scores[query, row], segment, row)
                for row in range(found)
            ]
    merged = merge(parts, k, metric, queries)
    for query in range(queries):
        expected = [(segment, row) for _, segment, row in sorted(everything[query])[:k]]
        there = merged.rows[query] >= 0
        assert list(zip(merged.segments[query][there], merged.rows[query][there], strict=True)) == expected
        assert there[: there.sum()].all()
        assert (merged.segments[query][~there] == -1).all()


def test_nothing_merges_to_nothing_for_each_query() -> None:
    assert [array.shape for array in merge([], 5, "cosine", 3)] == [(3, 0)] * 3


def test_a_padded_place_never_comes_before_a_bad_score() -> None:
    part = Part(np.array([[np.inf, 1e30]], np.float32), np.array([[0, 0]]), np.array([[-1, 4]]))
    assert merge([part], 1, "euclidean", 1).rows.tolist() == [[4]]
