"""Indexes on a GPU: all rows of a shelf in its memory, compared there with every query.

A shelf has a million rows at the most, which a GPU compares sooner than a CPU walks an index of them, and without missing
any. It computes as `flat` does with many queries on a CPU: by a matrix product in float32, which proposes a few rows more than
are wanted; those are scored exactly from the column, and a query for which rounding may have hidden a row is asked again
([ADR 0050](docs/adr/0050-a-gpu-is-tried-first-and-proves-what-it-finds.md)).
"""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

import numpy as np
import structlog

from gallery.arrays import Rows, Space, Stored, Vectors
from gallery.index import _exact, _faiss
from gallery.index._library import WITH_GPU, faiss
from gallery.index.base import Found, Index
from gallery.index.quantizer import Assignments
from gallery.index.selection import Selected
from gallery.index.stack import Stack

AUTO, CPU = "auto", "cpu"
#: rows that a GPU proposes at the most
MOST = 2048
# Beyond two for each row that is wanted: hardly a query is then asked again.
_MORE = 32
#: fewer rows are compared on the CPU before a GPU was asked
FEWEST_ROWS = 10_000
_TRIAL = "import sys; from gallery.index.device import Gpu; Gpu(int(sys.argv[1])).try_out()"
# In which a GPU is made ready that has to be woken first.
_TRIAL_SECONDS = 60

log = structlog.get_logger()


class NoSuchDevice(ValueError):
    """There is no such GPU, or the installed FAISS cannot use it."""


class Gpu:
    """A GPU as FAISS uses it: by one thread at a time (https://github.com/facebookresearch/faiss/wiki/Threads-and-asynchronous-calls).

    That goes for what frees memory, too. A snapshot is dropped by whichever thread held it last, so what is dropped is only put
    down here, and freed by the next that has the lock.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._resources = faiss.StandardGpuResources()
        self._lock = Lock()
        self._dropped: deque[Any] = deque()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While no other thread uses it. Searches that wait meanwhile gather and become one call."""
        with self._lock:
            self._dropped.clear()
            yield

    def hold(self, dimension: int, metric: int) -> Held:
        """Room for rows, compared by FAISS's `metric`."""
        config = faiss.GpuIndexFlatConfig()
        config.device = self._number
        with self.alone():
            return Held(self, faiss.GpuIndexFlat(self._resources, dimension, metric, config))

    def drop(self, flat: Any) -> None:
        """Free what this holds, later: this may be called anywhere, also by a thread that has the lock."""
        self._dropped.append(flat)

    def try_out(self) -> None:
        """Raise RuntimeError where it finds nothing, if FAISS does not end the process before."""
        rows = np.eye(8, dtype=np.float32)
        held = self.hold(8, faiss.METRIC_L2)
        held.add(rows)
        if held.search(rows, 1)[1][:, 0].tolist() != [*range(8)]:
            raise RuntimeError("it finds wrong rows")


class Held:
    """Rows in the memory of a GPU, for as long as somebody refers to this."""

    def __init__(self, gpu: Gpu, flat: Any) -> None:
        self._gpu = gpu
        self._flat = flat

    def __del__(self) -> None:
        self._gpu.drop(self._flat)

    def add(self, vectors: Vectors) -> None:
        """Copy rows (n, dimension) there; raises RuntimeError where there is no room."""
        with self._gpu.alone():
            self._flat.add(vectors)

    def search(self, queries: Vectors, count: int) -> tuple[Vectors, Rows]:
        """FAISS's scores and rows (queries, count); raises RuntimeError where there is no room to compute."""
        with self._gpu.alone():
            found: tuple[Vectors, Rows] = self._flat.search(queries, count)
        return found


class DeviceIndex(_faiss.FaissIndex):
    """A FAISS index that compares every row."""

    def __init__(self, held: Held, longest: float, *, vectors: Stored | Stack, space: Space) -> None:
        """Of `vectors`, the longest of which has this length, as they are `held`."""
        super().__init__("device", vectors=vectors, space=space)
        self._held = held
        self._longest = longest

    @property
    def reads(self) -> int:
        """Little, for the thread that waits for it."""
        return FEWEST_ROWS * int(self._column.shape[1])

    def compared(self, k: int, *, roughly: bool = False) -> int:
        """Twice as many as are wanted, and some."""
        return k + _MORE if roughly else 2 * k + _MORE

    def _found(self, assigned: Assignments, k: int, count: int, effort: float, selected: Selected | None) -> Found:
        if count <= MOST:
            with suppress(RuntimeError):  # which is how FAISS says that the memory is full
                if assigned.roughly:
                    return super()._found(assigned, k, count, effort, selected)
                return self._proven(assigned.queries, k, count, selected)
        return _exact.search_column(assigned.queries, self._column, k, self.space, selected)

    def _propose(self, assigned: Assignments, count: int, effort: float) -> Rows:  # noqa: ARG002
        return self._held.search(assigned.queries, count)[1]

    def _proven(self, queries: Vectors, k: int, count: int, selected: Selected | None) -> Found:
        """The `k` best of `count` rows that are proposed; of more, or of all, where others may be better."""
        products, rows = self._held.search(queries, count)
        found = self._ranked(queries, k, rows, selected)
        if count < len(self._column):
            proven = _exact.beyond_doubt(found.scores[:, -1], products, queries, self._longest, self.space.metric)
            # What overflowed is no number, and is not proposed: rows are missing.
            doubtful = np.flatnonzero(~proven | (rows < 0).any(axis=1))
            if len(doubtful):
                asked, most = queries[doubtful], min(MOST, len(self._column))
                found.scores[doubtful], found.rows[doubtful] = (
                    self._proven(asked, k, most, selected)
                    if count < most
                    else _exact.search_column(asked, self._column, k, self.space, selected)
                )
        return found


class Device:
    """One GPU, or none: where the indexes of a process live."""

    def __init__(self, name: str) -> None:
        """`auto` takes a GPU if FAISS can use one, `cpu` none, `cuda` the first, `cuda:1` the second.

        Raises:
            NoSuchDevice: the message says what would help.
        """
        number = _number(name)
        self._gpu = None if number is None else Gpu(number)

    def place(self, index: Index, columns: Sequence[Stored]) -> Index:
        """The rows of a shelf on the GPU; or `index`, prepared, where there is none, or no room in it, or where they are few."""
        vectors = Stack(columns)
        if self._gpu is not None and len(vectors) >= FEWEST_ROWS:
            with suppress(RuntimeError):
                return _placed(self._gpu, vectors, index.space)
        index.prepare()
        return index


def _placed(gpu: Gpu, vectors: Stack, space: Space) -> DeviceIndex:
    held, longest = gpu.hold(vectors.shape[1], _exact.faiss_metric(space.metric)), 0.0
    for column in vectors.columns:
        for start in range(0, len(column), _exact.BLOCK):
            part = column[start : start + _exact.BLOCK]
            # As they are scored: what is of unit length but for rounding is not rounded again.
            block = part if _exact.is_plain(part, space) else _exact.prepared(part, space)
            longest = max(longest, _exact.length(block))
            held.add(block)
    return DeviceIndex(held, longest, vectors=vectors, space=space)


def _number(name: str) -> int | None:
    """Which GPU a name means; None for the CPU."""
    if name == CPU:
        return None
    kind, _, number = name.partition(":")
    wanted = 0 if name == AUTO or not number else int(number) if number.isdecimal() else -1
    if kind not in (AUTO, "cuda") or wanted < 0:
        raise NoSuchDevice(f"an index lives on auto, cpu, cuda, or cuda:N, and not on {name!r}")
    if not hasattr(faiss, "StandardGpuResources"):
        if name == AUTO:
            return None
        raise NoSuchDevice(f"the installed FAISS knows no GPU: {WITH_GPU}, or set FORWARDFILL_INDEX_DEVICE=cpu")
    wrong = _tried(wanted)
    if wrong is None:
        return wanted
    if name == AUTO:
        log.warning("gpu_not_used", reason=wrong)
        return None
    raise NoSuchDevice(f"FAISS cannot use {name!r} ({wrong}): mend that, or set FORWARDFILL_INDEX_DEVICE=cpu")


def _tried(number: int) -> str | None:
    """What is wrong with a GPU, if anything.

    By another process, since FAISS ends the one that it is in where a GPU does not do what it asks: `faiss-gpu-cu12` 1.14 has
    code for compute capabilities 7 and 8 only, and aborts on an H100.
    """
    command = [sys.executable, "-c", _TRIAL, str(number)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"it is not ready after {_TRIAL_SECONDS} s"
    if not done.returncode:
        return None
    *_, last = done.stderr.strip().splitlines() or [f"its trial ended with {done.returncode}"]
    return last
