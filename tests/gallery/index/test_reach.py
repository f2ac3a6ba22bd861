"""Lists that are too far from a query are not read, none of which held a neighbour of the rows that were measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery.arrays import Metric, Space, Vectors
from gallery.index import _exact, _reach, ivf_pq, registry
from gallery.index._reach import Reach
from gallery.index._recall import Sample, sample
from gallery.index.base import JOINED, REACH, Index, ListsBackend
from gallery.index.ivf_pq import PqIndex
from gallery.index.quantizer import Nearest, shared, training_rows
from gallery.index.selection import Selected
from tests.gallery.index.conftest import queries_of

LISTS, PROBES = 80, 60
SPACES = (
    Space("euclidean", normalized=False),
    Space("cosine", normalized=False),
    Space("cosine", normalized=True),
    Space("inner_product", normalized=True),
)


@pytest.fixture(autouse=True)
def choosy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the 6,000 rows of the tests were many."""
    monkeypatch.setattr(ivf_pq, "_CHOOSY_ROWS", 1)


def column_of(vectors: Vectors, space: Space) -> Vectors:
    return _exact.prepared(vectors, Space("cosine", normalized=True)) if space.normalized else vectors


def told(times: float) -> dict[str, Any]:
    return {REACH: {"times": times, "nearest": 0.0}}


def opened(vectors: Vectors, space: Space, folder: Path, times: float | None, nprobe: int = PROBES) -> PqIndex:
    backend = registry.backend("ivf_pq")
    assert isinstance(backend, ListsBackend)
    parameters = backend.check({"nprobe": nprobe, "nlist": LISTS})
    path = folder / "index"
    if not path.exists():
        backend.build(vectors, space=space, path=path, parameters=parameters)
    index = backend.open(vectors, space=space, path=path, parameters=parameters | (told(times) if times else {}))
    assert isinstance(index, PqIndex)
    return index


@contextmanager
def reading(index: PqIndex) -> Iterator[list[int]]:
    """How many lists were read for each query, in turn."""
    counts: list[int] = []
    read = index._read

    def counted(queries: Vectors, count: int, near: Nearest | None, selected: Selected | None) -> object:
        counts.extend([index.nprobe] * len(queries) if near is None else (near.lists >= 0).sum(axis=1).tolist())
        return read(queries, count, near, selected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_read", counted)
        yield counts


def measured(vectors: Vectors, space: Space, asked: Sample, missed: float = 0) -> Reach | None:
    return _reach.measured(centroids(vectors, space), vectors, asked, nprobe=PROBES, missed=missed)


def centroids(vectors: Vectors, space: Space) -> Vectors:
    backend = registry.backend("ivf_pq")
    assert isinstance(backend, ListsBackend)
    return backend.train(training_rows([vectors], space, LISTS), LISTS, space, 10).centroids


@pytest.mark.parametrize("space", SPACES)
def test_lists_that_are_not_there_are_not_spared(space: Space, clustered: Vectors) -> None:
    """Segments share lists that were made for fewer rows, so as many may be asked for as there are not."""
    vectors = column_of(clustered, space)
    asked, own = sample(vectors, space), centroids(vectors, space)
    all_, more = (_reach.measured(own, vectors, asked, nprobe=nprobe) for nprobe in (LISTS, 4 * LISTS))
    assert more == all_
    near = own[:4]  # each query is near to all of four, so nothing is gained by choosing
    assert _reach.measured(near, vectors, asked, nprobe=4 * _reach.FEWEST) is None


@pytest.mark.parametrize("space", SPACES)
def test_no_neighbour_that_was_found_is_missed_for_it(space: Space, clustered: Vectors) -> None:
    vectors = column_of(clustered, space)
    asked = sample(vectors, space)
    reach = measured(vectors, space, asked)
    assert reach is not None
    near = shared(centroids(vectors, space), space.metric).nearest(asked.queries, PROBES)
    left = _reach.within(near, reach, space).lists
    lists = _exact.prepared(vectors[asked.rows.ravel()], space)
    own = _exact.search(lists, centroids(vectors, space), 1, "euclidean").rows.reshape(asked.rows.shape)
    for query in range(len(own)):
        assert not set(own[query]) & (set(near.lists[query]) - set(left[query]))
    assert (left >= 0).mean() < 0.75


@pytest.mark.parametrize("space", SPACES)
def test_no_more_neighbours_are_missed_for_it_than_may_be(
    space: Space, clustered: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_reach, "FEWEST", 1)
    vectors = column_of(clustered, space)
    asked = sample(vectors, space)
    whole, part = measured(vectors, space, asked), measured(vectors, space, asked, 0.02)
    assert whole is not None
    assert part is not None
    assert 1 <= part.times < whole.times
    near = shared(centroids(vectors, space), space.metric).nearest(asked.queries, PROBES)
    lists = _exact.prepared(vectors[asked.rows.ravel()], space)
    own = _exact.search(lists, centroids(vectors, space), 1, "euclidean").rows.reshape(*asked.rows.shape, 1)
    held = [(own == each.lists[:, None, :]).sum() for each in (near, _reach.within(near, part, space))]
    assert 0.98 <= held[1] / held[0] < 1


def test_it_is_not_measured_where_it_would_spare_little() -> None:
    noise = np.random.default_rng(0).standard_normal((3000, 48)).astype(np.float32)
    assert measured(noise, SPACES[0], sample(noise, SPACES[0])) is None


def test_the_inner_product_of_vectors_of_any_length_is_no_matter_of_distance(clustered: Vectors) -> None:
    space = Space("inner_product", normalized=False)
    assert measured(clustered, space, sample(clustered, space)) is None


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_far_lists_are_left_out_but_a_few_are_always_read(metric: Metric) -> None:
    far = np.arange(1, 13, dtype=np.float32)[None] / 10
    scores = (far if metric == "euclidean" else 1 - far * far / 2).astype(np.float32)
    near = Nearest(scores, np.arange(12)[None] + 100)
    space = Space(metric, normalized=True)
    assert _reach.within(near, Reach(10.05, 0.0), space).lists.tolist() == [[*range(100, 110), -1, -1]]
    assert _reach.within(near, Reach(1.0, 0.1), space).lists.tolist() == [[*range(100, 108), -1, -1, -1, -1]]
    assert _reach.within(near, Reach(2.0, 0.5), space).lists.tolist() == [[*range(100, 110), -1, -1]], (
        "as if 0.5 were the nearest"
    )
    assert near.lists.tolist() == [list(range(100, 112))]  # others may use them


def test_a_query_that_lies_near_a_centroid_reads_no_fewer_lists_for_that(
    clustered: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_reach, "FEWEST", 1)
    space = SPACES[0]
    asked, own = sample(clustered, space), centroids(clustered, space)
    reach = measured(clustered, space, asked)
    assert reach is not None
    near = shared(own, space.metric).nearest(np.concatenate([asked.queries, own]), PROBES)
    read = (_reach.within(near, reach, space).lists >= 0).sum(axis=1)
    rows, centres = read[: len(asked.queries)], read[len(asked.queries) :]
    assert centres.mean() >= np.quantile(rows, 0.1)
    assert centres.mean() > 1, "as near as it is to that list, no other would be within reach"


@pytest.mark.parametrize("space", SPACES)
def test_an_answer_does_not_depend_on_the_batch(space: Space, clustered: Vectors, tmp_path: Path) -> None:
    vectors = column_of(clustered, space)
    index, queries = opened(vectors, space, tmp_path, 2.0), queries_of(clustered, space)
    with reading(index) as counts:
        together = index.search(queries, 10)
    assert min(counts) < max(counts) <= PROBES
    for size in (1, 5):
        parts = [index.search(queries[at : at + size], 10) for at in range(0, len(queries), size)]
        assert np.array_equal(together.rows, np.concatenate([part.rows for part in parts]))
        assert np.array_equal(together.scores, np.concatenate([part.scores for part in parts]))


def test_where_more_are_looked_for_more_lists_are_read(clustered: Vectors, tmp_path: Path) -> None:
    index, queries = opened(clustered, SPACES[0], tmp_path, 2.0), queries_of(clustered, SPACES[0])

    def mean(k: int, share: float = 1) -> float:
        mask = np.random.default_rng(1).random(len(clustered)) < share
        with reading(index) as counts:
            index.search(queries, k, Selected(mask))
        return float(np.mean(counts[: len(queries)]))

    assert mean(10) == mean(3) < mean(15) < mean(21) == PROBES
    assert mean(10) < mean(10, 0.8) <= PROBES / 0.75


def test_where_near_lists_have_too_few_rows_all_are_read(tmp_path: Path) -> None:
    """Of 20 rows that are far from all others, each has a list for itself."""
    rng = np.random.default_rng(4)
    alone, crowd = 1000 * np.eye(20, 24, dtype=np.float32), rng.standard_normal((5000, 24)).astype(np.float32)
    vectors = np.concatenate([alone, crowd])
    index = opened(vectors, SPACES[0], tmp_path, 1.0)
    queries = np.ascontiguousarray(np.concatenate([vectors[:3], vectors[-3:]]))
    found = index.search(queries, 10)
    assert (found.rows >= 0).all()
    assert np.array_equal(found.rows[:, 0], [0, 1, 2, 5017, 5018, 5019])
    for at in range(len(queries)):
        assert np.array_equal(index.search(queries[at : at + 1], 10).rows[0], found.rows[at])


def test_a_small_index_does_not_choose(clustered: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivf_pq, "_CHOOSY_ROWS", 10_000)
    index = opened(clustered, SPACES[0], tmp_path, 1.2)
    with reading(index) as counts:
        index.search(queries_of(clustered, SPACES[0]), 10)
    assert set(counts) == {PROBES}


def test_joined_indexes_read_as_far_as_suffices_for_all_but_a_tenth_of_their_rows(
    clustered: Vectors, tmp_path: Path
) -> None:
    space, backend = SPACES[0], registry.backend("ivf_pq")
    assert isinstance(backend, ListsBackend)
    trained = backend.train(training_rows([clustered], space, LISTS), LISTS, space, 10)
    parameters = backend.check({"nprobe": 40})

    def joined(parts: int, reaches: list[float | None]) -> float:
        indexes: list[Index] = []
        for at, part in enumerate(np.array_split(clustered, parts)):
            path = tmp_path / f"{parts}-{at}"
            backend.build(part, space=space, path=path, parameters=parameters, trained=trained)
            times = reaches[at]
            reaching = (
                parameters if times is None else {**parameters, **told(3.0), JOINED: {**parameters, **told(times)}}
            )
            made = backend.open(part, space=space, path=path, parameters=reaching)
            indexes.append(made)
        whole = indexes[0].join(indexes[1:])
        assert isinstance(whole, PqIndex)
        return whole._reach.times

    assert joined(12, [1.1] * 6 + [1.4] * 5 + [1.6]) == 1.4  # each is less than a tenth
    assert joined(12, [1.1] * 6 + [1.4] * 4 + [1.6] * 2) == 1.6
    assert joined(3, [1.1, 1.2, 1.3]) == 3.0
    assert joined(12, [None] * 2 + [1.2] * 10) == inf
    assert joined(12, [None] + [1.2] * 11) == 1.2
