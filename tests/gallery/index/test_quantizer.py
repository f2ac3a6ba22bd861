"""Segments with the same centroids: a query is compared with them once, and no answer depends on that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gallery.arrays import Mask, Metric, Space, Vectors
from gallery.index import _exact, _filtering, registry
from gallery.index._ivf import IvfIndex
from gallery.index.base import Found, Index, ListsBackend
from gallery.index.quantizer import Assignments, Nearest, Quantizer, serves, shared, train, training_rows, wanted
from gallery.index.selection import Selected
from tests.gallery.index.conftest import best, reference, unit_length

METRICS: tuple[Metric, ...] = ("cosine", "inner_product", "euclidean")
PROBES = (4, 9, 30)


def segments(vectors: Vectors, space: Space, folder: Path) -> list[Index]:
    """Three indexes of the same 40 lists, of which they read different numbers."""
    backend = registry.backend("ivf")
    assert isinstance(backend, ListsBackend)
    trained = backend.train(training_rows([vectors], space, 40), 40, space)
    opened = []
    for at, (part, nprobe) in enumerate(zip(np.array_split(vectors, 3), PROBES, strict=True)):
        parameters = backend.check({"nprobe": nprobe})
        backend.build(part, space=space, path=folder / f"{at}", parameters=parameters, trained=trained)
        opened.append(backend.open(part, space=space, path=folder / f"{at}", parameters=parameters))
    return opened


def asked(indexes: Sequence[Index], queries: Vectors, k: int, selected: Sequence[Mask | None]) -> list[Found]:
    """All with the same assignments."""
    assigned = Assignments(queries)
    return [index.search(queries, k, only(mask), assigned) for index, mask in zip(indexes, selected, strict=True)]


def only(mask: Mask | None) -> Selected | None:
    return None if mask is None else Selected(mask)


@pytest.mark.parametrize("metric", METRICS)
def test_segments_that_are_asked_together_answer_as_they_do_alone_in_any_order_and_batch(
    metric: Metric, clustered: Vectors, queries: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_filtering, "FEW", 0)
    monkeypatch.setattr(_filtering, "SPARSE", 1.5)
    indexes = segments(clustered, Space(metric, normalized=False), tmp_path)
    rng = np.random.default_rng(5)
    for masks in ([None] * 3, [rng.random(2000) < share for share in (0.95, 0.6, 0.01)]):
        # the first is sieved, the second read from lists, the third compared
        alone = [index.search(queries, 1, only(mask)) for index, mask in zip(indexes, masks, strict=True)]
        backwards = asked(indexes[::-1], queries, 1, masks[::-1])[::-1]
        for found in (asked(indexes, queries, 1, masks), backwards):
            for one, other in zip(found, alone, strict=True):
                assert np.array_equal(one.rows, other.rows)
                assert np.array_equal(one.scores, other.scores)
        single = asked(indexes, queries[9:10], 1, masks)
        assert all(np.array_equal(one.rows[0], other.rows[9]) for one, other in zip(single, alone, strict=True))


def test_a_query_is_compared_with_the_centroids_once_for_all_segments(
    clustered: Vectors, queries: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexes = segments(clustered, Space("euclidean", normalized=False), tmp_path)
    counts: list[int] = []
    nearest = Quantizer.nearest

    def counted(quantizer: Quantizer, queries: Vectors, count: int) -> Nearest:
        counts.append(count)
        return nearest(quantizer, queries, count)

    monkeypatch.setattr(Quantizer, "nearest", counted)
    asked(indexes[::-1], queries, 5, [None] * 3)
    assert counts == [30]


def test_equal_centroids_are_one_object_and_others_are_not(clustered: Vectors, tmp_path: Path) -> None:
    first, *others = segments(clustered, Space("euclidean", normalized=False), tmp_path)
    assert isinstance(first, IvfIndex)
    assert all(isinstance(other, IvfIndex) and other.quantizer is first.quantizer for other in others)
    assert shared(first.quantizer.centroids.copy(), "euclidean") is first.quantizer
    assert shared(first.quantizer.centroids, "inner_product") is not first.quantizer
    assert shared(first.quantizer.centroids[1:], "euclidean") is not first.quantizer


@pytest.mark.parametrize("metric", METRICS)
def test_the_nearest_lists_are_the_best_by_the_metric_and_a_longer_answer_begins_with_the_shorter(
    metric: Metric, clustered: Vectors, queries: Vectors
) -> None:
    space = Space(metric, normalized=False)
    quantizer = Quantizer(train(training_rows([clustered], space, 50), 50, space), metric)
    assert np.array_equal(
        quantizer.nearest(queries, 7).lists, best(reference(queries, quantizer.centroids, metric), metric, 7)
    )
    assert np.array_equal(quantizer.nearest(queries, 30).lists[:, :7], quantizer.nearest(queries, 7).lists)


def test_a_sample_is_drawn_from_all_columns_and_is_the_same_each_time(clustered: Vectors) -> None:
    space = Space("cosine", normalized=False)
    columns = [clustered[:1000], clustered[1000:1003].astype(np.float16), clustered[1003:]]
    first = training_rows(columns, space, 20)
    assert np.array_equal(first, training_rows(columns, space, 20))
    assert first.shape == (20 * 64, 24)
    from_first = np.isin(first[:, 0], unit_length(clustered[:1000])[:, 0]).mean()
    assert 0.1 < from_first < 0.25  # a sixth of the rows are there
    assert np.array_equal(training_rows(columns[:2], space, 20), _exact.prepared(clustered[:1000], space)[:]) is False
    assert len(training_rows(columns[:2], space, 20)) == 1003


def test_lists_are_as_many_as_the_root_of_the_rows_but_never_too_many_to_train() -> None:
    assert [wanted(1_000_000, 1_000_000), wanted(1_000_000, 20_000), wanted(20, 20)] == [1000, 512, 1]


def test_centroids_serve_until_the_gallery_is_four_times_as_large() -> None:
    assert serves(100, wanted(40_000, 40_000))
    assert not serves(100, wanted(41_000, 41_000))
    assert serves(1000, 10), "a gallery that shrank needs no new ones"
