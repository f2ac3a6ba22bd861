"""Indexes on a device: its part of the work is FAISS's, ours is that answers are exact, and that one thread asks at a time.

Everything here is done with FAISS's index of all rows on the CPU in the place of the one on a GPU, which it equals in all but
where it computes; and with a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock, Thread
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from gallery.arrays import Space, Stored, Vectors
from gallery.index import _exact, device
from gallery.index.base import Index
from gallery.index.device import Device, Gpu
from gallery.index.flat import FlatIndex
from gallery.index.quantizer import Assignments
from gallery.index.selection import Selected
from tests.gallery.index.conftest import column_of, queries_of
from tests.gallery.index.test_every_backend import assert_right, assert_same, every_dtype, every_space

Make = Callable[[list[Stored], Space], Index]
# Not how many FAISS sees: on one that it cannot use it would end this process.
GPUS = hasattr(faiss, "StandardGpuResources") and device._tried(0) is None
EUCLIDEAN = Space("euclidean", normalized=False)


class Flat:
    """FAISS's index of a GPU, on the host: nothing of it may be done by two threads at once, nor while it is freed."""

    inside = Lock()
    #: a search waits for it, after it told so
    told, goes_on = Event(), Event()
    freed = 0
    #: searches by how many rows they ask for
    asked: list[int]
    full = False

    def __init__(self, resources: object, dimension: int, metric: int, config: Any) -> None:
        self._rows = faiss.IndexFlat(dimension, metric)
        self._rounds = getattr(config, "useFloat16", False)

    def __del__(self) -> None:
        with Alone():
            Flat.freed += 1

    def add(self, vectors: Vectors) -> None:
        with Alone():
            self._rows.add(self._rounded(vectors))

    def search(self, queries: Vectors, count: int) -> tuple[Vectors, np.ndarray]:
        with Alone():
            Flat.asked.append(count)
            if Flat.full:
                raise RuntimeError("StandardGpuResources: alloc fail")
            Flat.told.set()
            assert Flat.goes_on.wait(10)
            scores, rows = self._rows.search(self._rounded(queries), count)
            return scores, rows

    def _rounded(self, vectors: Vectors) -> Vectors:
        return vectors.astype(np.float16).astype(np.float32) if self._rounds else vectors


class Alone:
    """A block that two threads must not be in."""

    def __enter__(self) -> None:
        assert Flat.inside.acquire(blocking=False), "two threads at once"

    def __exit__(self, *_: object) -> None:
        Flat.inside.release()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that is this host."""
    Flat.freed, Flat.asked, Flat.full = 0, [], False
    Flat.goes_on.set()
    Flat.told.clear()
    faked = SimpleNamespace(
        StandardGpuResources=object, GpuIndexFlatConfig=SimpleNamespace, GpuIndexFlat=Flat, METRIC_L2=faiss.METRIC_L2
    )
    monkeypatch.setattr(device, "faiss", faked)
    monkeypatch.setattr(device, "_tried", lambda number: None)
    yield
    Flat.goes_on.set()


def on_a_gpu(columns: list[Stored], space: Space) -> Index:
    placed = Device("cuda").place(FlatIndex(columns[0], space), columns)
    assert placed.kind == "device"
    return placed


@pytest.fixture(params=["host", *([pytest.param("gpu", marks=pytest.mark.gpu)] if GPUS else [])])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    if request.param == "host":
        request.getfixturevalue("host")
    return on_a_gpu


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


def test_rows_that_differ_by_less_than_half_precision_tells_are_found(make: Make, clustered: Vectors) -> None:
    """Half-precision numbers around 1000 are half of one apart, and those of tiny vectors are all zero."""
    for column in (clustered + 1000, clustered * np.float32(1e-8)):
        index, queries = make([column], EUCLIDEAN), (column[:20] + column[20:40]) / 2
        assert_same(index.search(queries, 10), FlatIndex(column, EUCLIDEAN).search(queries, 10))


def test_where_rounding_may_have_hidden_a_row_a_gpu_is_asked_for_more_and_then_the_cpu(
    host: None, monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    same = np.repeat(clustered[:2], 3000, axis=0)  # of those that are equal, the first come first
    found = on_a_gpu([same], EUCLIDEAN).search(clustered[:1], 10)
    assert found.rows.tolist() == [[*range(10)]]
    assert Flat.asked == [52, device.MOST]


def test_candidates_of_another_comparison_need_no_proof(
    host: None, monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    queries = clustered[:1].copy()
    index = on_a_gpu([np.repeat(clustered[:2], 3000, axis=0)], EUCLIDEAN)
    found = index.search(queries, 10, assigned=Assignments(queries, roughly=True))
    assert (found.rows >= 0).all()
    assert Flat.asked == [42]


def test_where_a_gpu_leaves_rows_out_the_cpu_answers(
    host: None, monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    """As it does with those whose distance is no number; it puts the largest one beside -1."""
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    index = on_a_gpu([clustered], EUCLIDEAN)

    def search(flat: Flat, queries: Vectors, count: int) -> tuple[Vectors, np.ndarray]:
        shape = (len(queries), count)
        rows = np.where(np.arange(count) < 20, np.arange(count), -1)
        return np.full(shape, np.finfo(np.float32).max, np.float32), np.broadcast_to(rows, shape)

    monkeypatch.setattr(Flat, "search", search)
    queries = clustered[100:103]
    assert_same(index.search(queries, 10), FlatIndex(clustered, EUCLIDEAN).search(queries, 10))


def test_where_a_gpu_has_no_room_to_compute_the_cpu_answers(
    host: None, monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    index = on_a_gpu([clustered], EUCLIDEAN)
    Flat.full = True
    assert_same(index.search(clustered[:3], 10), FlatIndex(clustered, EUCLIDEAN).search(clustered[:3], 10))


def test_one_thread_asks_at_a_time_whatever_the_shelf(
    host: None, monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    gpu = Device("cuda")
    indexes = [gpu.place(FlatIndex(clustered, EUCLIDEAN), [clustered]) for _ in range(2)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda at: indexes[at % 2].search(clustered[:1].copy(), 3), range(400)))
    assert len(Flat.asked) == 400


def test_what_a_dropped_index_held_is_freed_by_who_uses_the_gpu_next_and_never_while_another_does(
    host: None, monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    """FAISS keeps what it allocated in a map without a lock: to free beside a search ruins it."""
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    gpu = Device("cuda")
    kept, dropped = (gpu.place(FlatIndex(clustered, EUCLIDEAN), [clustered]) for _ in range(2))
    Flat.goes_on.clear()
    searching = Thread(target=kept.search, args=(clustered[:1], 3))
    searching.start()
    assert Flat.told.wait(10)
    del dropped
    assert Flat.freed == 0
    Flat.goes_on.set()
    searching.join()
    kept.search(clustered[:1], 3)
    assert Flat.freed == 1


def test_searches_go_on_while_a_shelf_is_copied_there(
    host: None, monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    monkeypatch.setattr(_exact, "BLOCK", 1000)
    gpu, prepared, found = Device("cuda"), _exact.prepared, list[int]()
    placed = gpu.place(FlatIndex(clustered, EUCLIDEAN), [clustered])

    def reading(part: Stored, space: Space) -> Vectors:
        searching = Thread(target=lambda: found.extend(placed.search(clustered[:1], 1).rows[0].tolist()))
        searching.start()
        searching.join(10)
        return prepared(part, space)

    monkeypatch.setattr(_exact, "prepared", reading)
    half = clustered.astype(np.float16)
    gpu.place(FlatIndex(half, EUCLIDEAN), [half])
    assert found == [0] * 6


def test_a_gpu_that_ends_the_process_that_tries_it_is_left_alone_or_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As FAISS does on a GPU that its package has no code for."""
    monkeypatch.setattr(device, "faiss", SimpleNamespace(StandardGpuResources=object))
    script = "import os, sys; print('CUDA error 209 no kernel image', file=sys.stderr, flush=True); os.abort()"
    monkeypatch.setattr(device, "_TRIAL", script)
    assert Device("auto")._gpu is None
    with pytest.raises(device.NoSuchDevice, match=r"cannot use 'cuda:1' \(CUDA error 209 no kernel image\): .*=cpu"):
        Device("cuda:1")


def test_a_gpu_is_tried_as_it_is_used(host: None) -> None:
    Gpu(0).try_out()
    assert Flat.asked == [1]
    Flat.full = True
    with pytest.raises(RuntimeError, match="alloc fail"):
        Gpu(0).try_out()


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="FAISS can use no GPU, so nothing here was done on one")
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
