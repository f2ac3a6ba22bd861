"""Indexes on a device: its part of the work is FAISS's, ours is that answers are exact, and that one thread asks at a time.

Everything here is done with FAISS's index of all rows on the CPU in the place of the one on a GPU, which it equals in all but
where it computes; and with a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import faiss
import numpy as np
import pytest

from gallery.arrays import Space, Stored, Vectors
from gallery.index import _exact, _faiss, device
from gallery.index.base import Index
from gallery.index.device import Device, DeviceIndex
from gallery.index.flat import FlatIndex
from gallery.index.selection import Selected
from gallery.index.stack import Stack
from tests.gallery.index.conftest import column_of, queries_of
from tests.gallery.index.test_every_backend import assert_right, assert_same, every_dtype, every_space

Make = Callable[[list[Stored], Space], Index]
GPUS = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0


def on_the_host(columns: list[Stored], space: Space) -> Index:
    flat = faiss.IndexFlat(columns[0].shape[1], _exact.rough_metric(space))
    for column in columns:
        for block in _faiss.blocks(column, space):
            flat.add(block)
    return DeviceIndex(flat, Lock(), vectors=Stack(columns), space=space)


def on_a_gpu(columns: list[Stored], space: Space) -> Index:
    placed = Device("cuda").place(FlatIndex(columns[0], space), columns)
    assert placed.kind == "device"
    return placed


@pytest.fixture(params=["host", *([pytest.param("gpu", marks=pytest.mark.gpu)] if GPUS else [])])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    return on_the_host if request.param == "host" else on_a_gpu


@every_space
@every_dtype
class TestAnswers:
    """What is found, in every space and storage type."""

    @pytest.fixture
    def asked(self, make: Make, space: Space, dtype: str, clustered: Vectors) -> tuple[Index, Stored, Vectors]:
        column = column_of(clustered, space, dtype)
        return make([column[:2500], column[2500:]], space), column, queries_of(clustered, space)

    def test_the_best_rows_are_found_with_their_exact_scores(
        self, space: Space, asked: tuple[Index, Stored, Vectors]
    ) -> None:
        index, column, queries = asked
        assert_right("flat", index.search(queries, 10), queries, column, space.metric, 10)

    @pytest.mark.parametrize("share", [0.99, 0.5, 0.05])
    def test_rows_that_are_not_selected_are_never_found(
        self, space: Space, share: float, asked: tuple[Index, Stored, Vectors]
    ) -> None:
        index, column, queries = asked
        selected = np.random.default_rng(5).random(len(column)) < share
        found = index.search(queries, 10, Selected(selected))
        assert_right("flat", found, queries, column, space.metric, 10, selected)

    def test_a_score_is_the_one_that_exact_search_gives(
        self, space: Space, asked: tuple[Index, Stored, Vectors]
    ) -> None:
        index, column, queries = asked
        exact, found = FlatIndex(column, space).search(queries, 10), index.search(queries, 10)
        same = exact.rows == found.rows
        assert np.array_equal(exact.scores[same], found.scores[same])


def test_more_hits_than_a_gpu_proposes_are_compared_on_the_cpu(make: Make, clustered: Vectors) -> None:
    space = Space("euclidean", normalized=False)
    index, queries = make([clustered], space), queries_of(clustered, space)[:2]
    assert_same(index.search(queries, device.MOST + 1), FlatIndex(clustered, space).search(queries, device.MOST + 1))


def test_many_threads_at_once_get_the_answers_of_one(make: Make, clustered: Vectors) -> None:
    space = Space("cosine", normalized=False)
    index, queries = make([clustered], space), queries_of(clustered, space)
    expected = index.search(queries, 10)
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda at: index.search(queries[at : at + 1], 10), range(len(queries)))
        for at, each in enumerate(found):
            assert np.array_equal(each.rows[0], expected.rows[at])


class Alone:
    """A flat index that two threads must not meet in."""

    def __init__(self) -> None:
        self.inside = Lock()
        self.calls = 0

    def search(self, queries: Vectors, count: int) -> tuple[Vectors, np.ndarray]:
        assert self.inside.acquire(blocking=False), "two threads at once"
        self.calls += 1
        rows = np.tile(np.arange(count, dtype=np.int64), (len(queries), 1))
        self.inside.release()
        return np.zeros(rows.shape, np.float32), rows


def test_one_thread_asks_at_a_time_whatever_the_shelf() -> None:
    vectors = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    flat, lock = Alone(), Lock()
    indexes = [
        DeviceIndex(flat, lock, vectors=Stack([vectors]), space=Space("euclidean", normalized=False)) for _ in range(2)
    ]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda at: indexes[at % 2].search(vectors[:1].copy(), 3), range(400)))
    assert flat.calls == 400


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="FAISS sees no GPU, so nothing here was done on one")
def test_where_there_is_a_gpu_indexes_live_there_unless_told_otherwise(
    clustered: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    index = FlatIndex(clustered, Space("euclidean", normalized=False))
    assert Device("auto").place(index, [clustered]).kind == "device"
    assert Device("cpu").place(index, [clustered]) is index


def test_without_a_gpu_indexes_stay_where_they_are(clustered: Vectors) -> None:
    index = FlatIndex(clustered, Space("euclidean", normalized=False))
    assert Device("cpu").place(index, [clustered]) is index
    if not GPUS:
        assert Device("auto").place(index, [clustered]) is index


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cuda:x", "cuda:-1", ""])
def test_a_device_that_is_not_there_is_named_with_what_would_be_right(name: str) -> None:
    with pytest.raises(ValueError, match=r"FORWARDFILL_INDEX_DEVICE=cpu|auto, cpu, cuda, or cuda:N"):
        Device(name)
