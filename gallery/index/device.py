"""Indexes on a GPU: all rows of a shelf in its memory, compared there with every query.

A shelf has a million rows at the most, which a GPU compares sooner than a CPU walks an index of them, and without missing
any. As half-precision numbers they take half of the memory; so the GPU proposes, and rows are scored exactly from the
column, as for any index. FAISS gives one thread at a time a GPU's resources
(https://github.com/facebookresearch/faiss/wiki/Threads-and-asynchronous-calls): a lock sees to that, and searches that wait
meanwhile gather and become one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from threading import Lock
from typing import Any

from gallery.arrays import Rows, Space, Stored
from gallery.index import _exact, _faiss
from gallery.index._library import faiss
from gallery.index.base import Found, Index
from gallery.index.quantizer import Assignments
from gallery.index.selection import Selected
from gallery.index.stack import Stack

AUTO, CPU = "auto", "cpu"
#: rows that a GPU proposes at the most
MOST = 2048
# Beyond two for each row that is wanted: half-precision numbers order near rows otherwise.
_MORE = 32
#: fewer rows are compared on the CPU before a GPU was asked
FEWEST_ROWS = 10_000


class NoSuchDevice(ValueError):
    """There is no such GPU, or the installed FAISS cannot use one."""


class DeviceIndex(_faiss.FaissIndex):
    """A FAISS index that compares every row, asked by one thread at a time."""

    def __init__(self, flat: Any, lock: Lock, *, vectors: Stored | Stack, space: Space) -> None:
        super().__init__("device", vectors=vectors, space=space)
        self._flat = flat
        self._lock = lock

    @property
    def reads(self) -> int:
        """Little, for the thread that waits for it."""
        return FEWEST_ROWS * int(self._column.shape[1])

    def compared(self, k: int, *, roughly: bool = False) -> int:
        """Twice as many as are wanted, and some."""
        return k + _MORE if roughly else 2 * k + _MORE

    def _found(self, assigned: Assignments, k: int, count: int, effort: float, selected: Selected | None) -> Found:
        if count > MOST:
            return _exact.search_column(assigned.queries, self._column, k, self.space, selected)
        return super()._found(assigned, k, count, effort, selected)

    def _propose(self, assigned: Assignments, count: int, effort: float) -> Rows:  # noqa: ARG002
        with self._lock:
            rows: Rows = self._flat.search(assigned.queries, count)[1]
        return rows


class Device:
    """One GPU, or none: where the indexes of a process live."""

    def __init__(self, name: str) -> None:
        """`auto` takes a GPU if there is one, `cpu` none, `cuda` the first, `cuda:1` the second.

        Raises:
            NoSuchDevice: the message says what would help.
        """
        self._lock = Lock()
        self._number = _number(name)
        self._resources = None if self._number is None else faiss.StandardGpuResources()

    def place(self, index: Index, columns: Sequence[Stored]) -> Index:
        """The rows of a shelf on the GPU; or `index`, prepared, where there is none, or no room in it, or where they are few."""
        vectors = Stack(columns)
        if self._resources is not None and len(vectors) >= FEWEST_ROWS:
            with suppress(RuntimeError), self._lock:  # which is how FAISS says that the memory is full
                flat = self._filled(vectors, index.space)
                return DeviceIndex(flat, self._lock, vectors=vectors, space=index.space)
        index.prepare()
        return index

    def _filled(self, vectors: Stack, space: Space) -> Any:
        config = faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = self._number, True
        flat = faiss.GpuIndexFlat(self._resources, vectors.shape[1], _exact.rough_metric(space), config)
        for column in vectors.columns:
            for block in _faiss.blocks(column, space):
                flat.add(block)
        return flat


def _number(name: str) -> int | None:
    """Which GPU a name means; None for the CPU."""
    there = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if name == CPU or (name == AUTO and not there):
        return None
    kind, _, number = name.partition(":")
    wanted = 0 if name == AUTO or not number else int(number) if number.isdecimal() else -1
    if kind not in (AUTO, "cuda") or wanted < 0:
        raise NoSuchDevice(f"an index lives on auto, cpu, cuda, or cuda:N, and not on {name!r}")
    if wanted >= there:
        raise NoSuchDevice(
            f"FAISS sees {there} GPUs, and {name!r} is not among them: install the extra `gpu`, or set "
            "FORWARDFILL_INDEX_DEVICE=cpu"
        )
    return wanted
