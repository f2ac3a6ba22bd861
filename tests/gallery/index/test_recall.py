"""Recall is measured against exact search, on the column's own rows, none of which is its own neighbour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gallery.arrays import Mask, Metric, Space, Vectors
from gallery.index import _exact
from gallery.index._ivf import IvfIndex
from gallery.index._recall import held, recall, sample
from gallery.index.base import Found
from gallery.index.selection import Selected
from tests.gallery.index.conftest import best, build, reference, unit_length

METRICS: tuple[Metric, ...] = ("cosine", "inner_product", "euclidean")


class Blind:
    """Exact search that never sees the rows of its mask."""

    kind = "blind"

    def __init__(self, vectors: Vectors, space: Space, seen: Mask) -> None:
        self.vectors, self.space, self.seen = vectors, space, seen

    def search(self, queries: Vectors, k: int, selected: Selected | None = None) -> Found:
        """An `Index`."""
        assert selected is None
        return _exact.search_column(queries, self.vectors, k, self.space, Selected(self.seen))


@pytest.mark.parametrize("metric", METRICS)
def test_recall_is_the_share_of_true_neighbours_that_is_found(metric: Metric, clustered: Vectors) -> None:
    space = Space(metric, normalized=False)
    asked = sample(clustered, space)
    seen = np.random.default_rng(1).random(len(clustered)) < 0.7
    queries = unit_length(clustered[asked.own]) if metric == "cosine" else clustered[asked.own]
    truth = best(reference(queries, clustered, metric), metric, 11)
    neighbours = [[row for row in line if row != own][:10] for line, own in zip(truth.tolist(), asked.own, strict=True)]
    assert recall(Blind(clustered, space, seen), asked) == pytest.approx(seen[np.array(neighbours)].mean(), abs=0.002)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [1, 2, 7, 400])
def test_exact_search_finds_everything_however_few_the_rows(
    metric: Metric, rows: int, clustered: Vectors, tmp_path: Path
) -> None:
    space = Space(metric, normalized=False)
    assert recall(build("flat", clustered[:rows], space, tmp_path), sample(clustered[:rows], space)) == 1


def test_another_row_that_is_as_near_is_as_good() -> None:
    vectors = np.repeat(np.eye(8, dtype=np.float32), 50, axis=0)
    space = Space("euclidean", normalized=False)
    half = np.arange(len(vectors)) % 2 == 0  # 25 of the 50 equal rows are left
    assert recall(Blind(vectors, space, half), sample(vectors, space)) == 1


def test_a_sample_is_the_same_each_time(clustered: Vectors) -> None:
    first, second = (sample(clustered.astype(np.float16), Space("cosine", normalized=True)) for _ in range(2))
    assert np.array_equal(first.own, second.own)
    assert np.array_equal(first.scores, second.scores)


@pytest.mark.parametrize("metric", METRICS)
def test_what_so_many_lists_hold_is_known_without_a_search(metric: Metric, clustered: Vectors, tmp_path: Path) -> None:
    space = Space(metric, normalized=False)
    asked = sample(clustered, space)
    for nprobe in (1, 2, 5, len(clustered)):
        index = build("ivf", clustered, space, tmp_path, nprobe=nprobe)
        assert isinstance(index, IvfIndex)
        found, there = recall(index, asked), held(index.places(asked.queries, asked.rows), asked, nprobe)
        assert found >= there - 0.003
        # By inner product some of the nearest lists are all but empty, and then all rows are read.
        assert metric == "inner_product" or found == pytest.approx(there, abs=0.003)
