"""What IVF and HNSW share, and the parameters of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from gallery.arrays import Space, Vectors
from gallery.index import _filtering, registry
from gallery.index.selection import Selected
from tests.gallery.index.conftest import best, build, reference

EUCLIDEAN = Space("euclidean", normalized=False)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("ivf", {"nprobe": 0}, "'nprobe' must be a whole number from 1 to"),
        ("ivf", {"nlist": -1}, "'nlist' must be a whole number from 0"),
        ("ivf", {"nlist": 2.5}, "'nlist' must be a whole number"),
        ("hnsw", {"m": 1}, "'m' must be a whole number from 2 to 128, not 1"),
        ("hnsw", {"ef_search": True}, "'ef_search' must be a whole number"),
        ("hnsw", {"ef_construction": "200"}, "'ef_construction' must be a whole number"),
        ("hnsw", {"nprobe": 3}, "has no parameter 'nprobe'; it has m, ef_construction, ef_search"),
    ],
)
def test_a_wrong_parameter_is_named_with_what_would_be_right(name: str, parameters: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.backend(name).check(parameters)


def test_reading_every_list_makes_ivf_exact(clustered: Vectors, queries: Vectors, tmp_path: Path) -> None:
    for space in (EUCLIDEAN, Space("inner_product", normalized=False)):
        found = build("ivf", clustered, space, tmp_path, nlist=20, nprobe=20).search(queries, 10)
        assert np.array_equal(found.rows, best(reference(queries, clustered, space.metric), space.metric, 10))


def test_more_lists_than_rows_are_as_many_as_rows(clustered: Vectors, queries: Vectors, tmp_path: Path) -> None:
    index = build("ivf", clustered[:7], EUCLIDEAN, tmp_path, nlist=5000, nprobe=5000)
    assert np.array_equal(np.sort(index.search(queries, 7).rows, axis=1), np.tile(np.arange(7), (64, 1)))


@pytest.mark.parametrize(("name", "low", "high"), [("ivf", {"nprobe": 1}, {"nprobe": 64}), ("hnsw", {}, {})])
def test_effort_is_set_when_opening_not_when_building(
    name: str, low: dict[str, int], high: dict[str, int], clustered: Vectors, queries: Vectors, tmp_path: Path
) -> None:
    low, high = (low, high) if low else ({"ef_search": 1}, {"ef_search": 500})
    backend, path = registry.backend(name), tmp_path / "index"
    backend.build(clustered, space=EUCLIDEAN, path=path, parameters=backend.check(low))
    expected = best(reference(queries, clustered, "euclidean"), "euclidean", 1)
    # Both are open at once: neither may steer the other.
    hasty, thorough = (
        backend.open(clustered, space=EUCLIDEAN, path=path, parameters=backend.check(p)) for p in (low, high)
    )
    right = [(index.search(queries, 1).rows == expected).mean() for index in (thorough, hasty, thorough)]
    assert right[0] == right[2] == 1
    assert right[1] < 1


@pytest.mark.parametrize("name", ["ivf", "ivf_pq", "hnsw"])
def test_an_index_of_another_column_is_refused(name: str, clustered: Vectors, tmp_path: Path) -> None:
    build(name, clustered[:100], EUCLIDEAN, tmp_path)
    backend, path = registry.backend(name), tmp_path / f"{name}.index"
    for other in (clustered[:99], clustered[:100, :8]):
        with pytest.raises(ValueError, match="indexes 100 x 24 vectors, and the column has"):
            backend.open(other, space=EUCLIDEAN, path=path, parameters=backend.check({}))
    with pytest.raises(ValueError, match=f"{name} needs its index file"):
        backend.open(clustered[:100], space=EUCLIDEAN, path=None, parameters=backend.check({}))


def test_queries_for_which_the_lists_hold_too_few_rows_are_answered_exactly(
    clustered: Vectors, queries: Vectors, tmp_path: Path
) -> None:
    index = build("ivf", clustered, EUCLIDEAN, tmp_path, nlist=200, nprobe=1)
    selected = np.arange(len(clustered)) % 2 == 0
    for k, mask in ((300, None), (300, selected)):
        found = index.search(queries, k, None if mask is None else Selected(mask))
        expected = best(reference(queries, clustered, "euclidean"), "euclidean", k, mask)
        short = [(np.sort(a) == np.sort(b)).all() for a, b in zip(found.rows, expected, strict=True)]
        assert (found.rows >= 0).all()
        assert np.mean(short) > 0.9


def test_building_a_graph_leaves_the_number_of_threads_as_it_was(clustered: Vectors, tmp_path: Path) -> None:
    before = faiss.omp_get_max_threads()
    build("hnsw", clustered[:50], EUCLIDEAN, tmp_path)
    assert faiss.omp_get_max_threads() == before


def test_a_byte_for_each_number_takes_a_third_of_the_file_and_the_best_are_ranked_by_exact_scores(
    clustered: Vectors, queries: Vectors, tmp_path: Path
) -> None:
    full = build("ivf", clustered, EUCLIDEAN, tmp_path, nlist=20, nprobe=20).search(queries, 10)
    rough = build("ivf_sq8", clustered, EUCLIDEAN, tmp_path, nlist=20, nprobe=20).search(queries, 10)
    sizes = [(tmp_path / f"{name}.index").stat().st_size for name in ("ivf", "ivf_sq8")]
    assert sizes[1] < 0.4 * sizes[0]  # each row also has its number, of 8 bytes
    hasty = build("ivf_sq8", clustered, EUCLIDEAN, tmp_path, nlist=20, nprobe=20, rerank=1).search(queries, 10)
    assert (hasty.rows != full.rows).any()
    same = rough.rows == full.rows
    assert same.mean() > 0.99
    assert np.array_equal(rough.scores[same], full.scores[same])


@pytest.mark.parametrize("name", ["ivf", "ivf_pq", "ivf_sq8"])
def test_a_search_for_few_rows_reads_more_lists_until_that_changes_nothing(
    name: str, clustered: Vectors, queries: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_filtering, "FEW", 0)
    index = build(name, clustered, EUCLIDEAN, tmp_path, nlist=100, nprobe=2)
    selected = np.arange(len(clustered)) % 3 == 0
    monkeypatch.setattr(_filtering, "SPARSE", 2)
    expected = best(reference(queries, clustered, "euclidean"), "euclidean", 10, selected)
    shared = [
        len(set(a) & set(b)) for a, b in zip(index.search(queries, 10, Selected(selected)).rows, expected, strict=True)
    ]
    unfiltered = best(reference(queries, clustered, "euclidean"), "euclidean", 10)
    alone = [len(set(a) & set(b)) for a, b in zip(index.search(queries, 10).rows, unfiltered, strict=True)]
    assert np.mean(alone) < 9.5 < np.mean(shared)
