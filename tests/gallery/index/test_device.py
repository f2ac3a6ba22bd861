"""Indexes on a device: a library compares, FAISS or PyTorch; ours is that answers are exact, and who may ask it when.

Everything here is done with this host as the device: PyTorch computes here as it does there, and FAISS's index of all rows on
the CPU equals the one on a GPU in all but where it computes. Where there is a GPU, it is done there as well.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from gallery.arrays import Metric, Space, Stored, Vectors
from gallery.index import _exact, device, faiss_gpu
from gallery.index.base import Index
from gallery.index.device import Device, Gpu, Open
from gallery.index.faiss_gpu import FaissGpu, open_faiss
from gallery.index.flat import FlatIndex
from gallery.index.quantizer import Assignments
from gallery.index.selection import Selected
from models import nearest
from models.nearest import TorchGpu, open_torch
from tests.gallery.index.conftest import column_of, queries_of
from tests.gallery.index.test_every_backend import assert_right, assert_same, every_dtype, every_space

Make = Callable[[list[Stored], Space], Index]
# Not how many FAISS sees: on one that it cannot use it would end this process.
FAISS_GPUS = hasattr(faiss, "StandardGpuResources") and faiss_gpu._tried(0) is None
TORCH_GPUS = torch.cuda.is_available()
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
        StandardGpuResources=object,
        GpuIndexFlatConfig=SimpleNamespace,
        GpuIndexFlat=Flat,
        METRIC_L2=faiss.METRIC_L2,
        METRIC_INNER_PRODUCT=faiss.METRIC_INNER_PRODUCT,
    )
    monkeypatch.setattr(faiss_gpu, "faiss", faked)
    monkeypatch.setattr(faiss_gpu, "_tried", lambda number: None)
    yield
    Flat.goes_on.set()


def open_host(number: int) -> Gpu:
    """This host, as PyTorch computes on it."""
    gpu = TorchGpu("cpu")
    gpu.try_out()
    return gpu


def on_a_gpu(columns: list[Stored], space: Space, by: Open = open_faiss) -> Index:
    placed = Device("cuda", (by,)).place(FlatIndex(columns[0], space), columns)
    assert placed.kind == "device"
    return placed


WAYS = {"faiss, host": open_faiss, "faiss, gpu": open_faiss, "pytorch, host": open_host, "pytorch, gpu": open_torch}


@pytest.fixture(
    params=[
        "faiss, host",
        "pytorch, host",
        *([pytest.param("faiss, gpu", marks=pytest.mark.gpu)] if FAISS_GPUS else []),
        *([pytest.param("pytorch, gpu", marks=pytest.mark.gpu)] if TORCH_GPUS else []),
    ]
)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    if request.param == "faiss, host":
        request.getfixturevalue("host")
    return partial(on_a_gpu, by=WAYS[request.param])


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


@pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
def test_products_too_small_for_float32_to_tell_prove_nothing(make: Make, metric: Metric) -> None:
    numbers, space = np.random.default_rng(0), Space(metric, normalized=False)
    column, queries = ((numbers.standard_normal((rows, 64)) * 1e-23).astype(np.float32) for rows in (12_000, 20))
    index, flat = make([column], space), FlatIndex(column, space)
    found = index.search(queries, 10)
    for at in range(len(queries)):
        # Not rows: so many are equally good that which of them come first is anybody's.
        assert found.scores[at].tolist() == flat.search(queries[at : at + 1], 10).scores[0].tolist()


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


def test_a_shelf_that_cannot_be_put_on_a_gpu_stays_on_the_cpu_and_the_first_is_told_of(
    host: None, monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    gpu, index = Device("cuda", (open_faiss,)), FlatIndex(clustered, EUCLIDEAN)

    def add(flat: Flat, vectors: Vectors) -> None:
        raise RuntimeError("StandardGpuResources: alloc fail")

    monkeypatch.setattr(Flat, "add", add)
    with capture_logs() as logs:
        assert all(gpu.place(index, [clustered]) is index for _ in range(3))
    assert [(each["event"], each["rows"], each["reason"]) for each in logs] == [
        ("gpu_not_used", len(clustered), "StandardGpuResources: alloc fail")
    ]


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells and limits what a process has of memory in this way"
)
def test_rows_that_would_leave_no_room_to_compare_them_are_not_put_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    gpu, index = Device("cuda", (open_host,)), FlatIndex(clustered, EUCLIDEAN)
    with at_most(clustered.nbytes + (100 << 20)):
        assert gpu.place(index, [clustered]) is index
    assert gpu.place(index, [clustered]).kind == "device"


@pytest.mark.gpu
@pytest.mark.skipif(not TORCH_GPUS, reason="PyTorch can use no GPU here")
def test_rows_that_would_leave_a_gpu_no_room_to_compare_them_stay_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    gpu, index = Device("cuda", (open_torch,)), FlatIndex(clustered, EUCLIDEAN)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + clustered.nbytes + (100 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        assert gpu.place(index, [clustered]) is index
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert gpu.place(index, [clustered]).kind == "device"


@contextmanager
def at_most(more: int) -> Iterator[None]:
    """This process gets so many more bytes of memory, which for PyTorch here is that of the device."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_one_thread_asks_at_a_time_whatever_the_shelf(
    host: None, monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    gpu = Device("cuda", (open_faiss,))
    indexes = [gpu.place(FlatIndex(clustered, EUCLIDEAN), [clustered]) for _ in range(2)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda at: indexes[at % 2].search(clustered[:1].copy(), 3), range(400)))
    assert len(Flat.asked) == 400


def test_what_a_dropped_index_held_is_freed_by_who_uses_the_gpu_next_and_never_while_another_does(
    host: None, monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    """FAISS keeps what it allocated in a map without a lock: to free beside a search ruins it."""
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    gpu = Device("cuda", (open_faiss,))
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
    gpu, prepared, found = Device("cuda", (open_faiss,)), _exact.prepared, list[int]()
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
    monkeypatch.setattr(faiss_gpu, "faiss", SimpleNamespace(StandardGpuResources=object))
    script = "import os, sys; print('CUDA error 209 no kernel image', file=sys.stderr, flush=True); os.abort()"
    monkeypatch.setattr(faiss_gpu, "_TRIAL", script)
    with capture_logs() as logs:
        assert Device("auto", (open_faiss,))._gpu is None
    assert [(each["event"], each["reason"]) for each in logs] == [
        ("gpu_not_used", "FAISS: CUDA error 209 no kernel image")
    ]
    with pytest.raises(device.NoSuchDevice, match=r"on 'cuda:1' \(FAISS: CUDA error 209 no kernel image\): .*=cpu"):
        Device("cuda:1", (open_faiss,))


def test_where_faiss_cannot_use_a_gpu_pytorch_does(monkeypatch: pytest.MonkeyPatch, clustered: Vectors) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)

    def unknown(number: int) -> Gpu:
        raise RuntimeError("FAISS: CUDA error 209 no kernel image")

    column = clustered
    placed = Device("auto", (unknown, open_host)).place(FlatIndex(column, EUCLIDEAN), [column])
    assert placed.kind == "device"
    assert_same(placed.search(column[:9], 10), FlatIndex(column, EUCLIDEAN).search(column[:9], 10))


@pytest.mark.parametrize(
    "wrong", [AssertionError("Invalid device id"), torch.cuda.DeferredCudaCallError("CUDA call failed lazily")]
)
def test_whatever_pytorch_says_is_wrong_with_a_gpu_it_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, wrong: Exception
) -> None:
    def fail(gpu: TorchGpu) -> None:
        raise wrong

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(TorchGpu, "try_out", fail)
    with capture_logs() as logs:
        assert Device("auto", (open_torch,))._gpu is None
    assert [(each["event"], each["reason"]) for each in logs] == [("gpu_not_used", f"PyTorch: {wrong}")]


def test_each_library_is_tried_as_it_is_used(host: None) -> None:
    FaissGpu(0).try_out()
    assert Flat.asked == [1]
    Flat.full = True
    with pytest.raises(RuntimeError, match="alloc fail"):
        FaissGpu(0).try_out()
    TorchGpu("cpu").try_out()


def test_a_gpu_that_computes_more_roughly_than_in_float32_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorFloat-32 does, which an environment may ask for, and by which no answer could be proven."""
    exact = torch.addmm

    def roughly(added: torch.Tensor, one: torch.Tensor, other: torch.Tensor, *, alpha: float) -> torch.Tensor:
        return exact(
            added, *((each.view(torch.int32) & ~0x1FFF).view(torch.float32) for each in (one, other)), alpha=alpha
        )

    monkeypatch.setattr(torch, "addmm", roughly)
    with pytest.raises(RuntimeError, match="wrong rows"):
        TorchGpu("cpu").try_out()


def test_a_shelf_that_is_more_than_is_compared_at_once_is_compared_in_parts(
    monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    monkeypatch.setattr(nearest, "_PRODUCTS", 700 * 20)
    for space in (EUCLIDEAN, Space("inner_product", normalized=False)):
        index = on_a_gpu([clustered], space, open_host)
        assert_same(index.search(clustered[:20], 10), FlatIndex(clustered, space).search(clustered[:20], 10))


def test_a_gpu_that_fails_is_told_of_once_and_the_cpu_answers(
    host: None, monkeypatch: pytest.MonkeyPatch, clustered: Vectors
) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    index = on_a_gpu([clustered], EUCLIDEAN)
    Flat.full = True
    with capture_logs() as logs:
        for _ in range(3):
            index.search(clustered[:1], 3)
    assert [(each["event"], each["reason"]) for each in logs] == [
        ("gpu_search_failed", "StandardGpuResources: alloc fail")
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not (FAISS_GPUS or TORCH_GPUS), reason="no library can use a GPU, so nothing here was done on one")
def test_where_there_is_a_gpu_indexes_live_there_unless_told_otherwise(
    clustered: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "FEWEST_ROWS", 1)
    index = FlatIndex(clustered, Space("euclidean", normalized=False))
    assert Device("auto", (open_faiss, open_torch)).place(index, [clustered]).kind == "device"
    assert Device("cpu", (open_faiss, open_torch)).place(index, [clustered]) is index


def test_without_a_gpu_indexes_stay_where_they_are(clustered: Vectors) -> None:
    index = FlatIndex(clustered, Space("euclidean", normalized=False))
    assert Device("cpu", (open_host,)).place(index, [clustered]) is index
    if not (FAISS_GPUS or TORCH_GPUS):
        assert Device("auto", (open_faiss, open_torch)).place(index, [clustered]) is index


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cuda:x", "cuda:-1", ""])
def test_a_device_that_is_not_there_is_named_with_what_would_be_right(name: str) -> None:
    with pytest.raises(ValueError, match=r"FORWARDFILL_INDEX_DEVICE=cpu|auto, cpu, cuda, or cuda:N"):
        Device(name, (open_faiss, open_torch))
