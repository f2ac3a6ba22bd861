"""Rows in a GPU's memory, compared by FAISS: needs `faiss-gpu-cu12` in the place of `faiss-cpu`, and a GPU that it knows."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np

from gallery.arrays import Rows, Vectors
from gallery.index._library import faiss

_TRIAL = "import sys; from gallery.index.faiss_gpu import FaissGpu; FaissGpu(int(sys.argv[1])).try_out()"
# In which a GPU is made ready that has to be woken first.
_TRIAL_SECONDS = 60


class FaissGpu:
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

    def hold(self, rows: int, dimension: int, *, by_distance: bool) -> FaissHeld:  # noqa: ARG002 - FAISS grows
        """Room for rows, as `device.Gpu` says."""
        config = faiss.GpuIndexFlatConfig()
        config.device = self._number
        metric = faiss.METRIC_L2 if by_distance else faiss.METRIC_INNER_PRODUCT
        with self.alone():
            return FaissHeld(self, faiss.GpuIndexFlat(self._resources, dimension, metric, config))

    def drop(self, flat: Any) -> None:
        """Free what this holds, later: this may be called anywhere, also by a thread that has the lock."""
        self._dropped.append(flat)

    def try_out(self) -> None:
        """Raise RuntimeError where it finds nothing, if FAISS does not end the process before."""
        rows = np.eye(8, dtype=np.float32)
        held = self.hold(*rows.shape, by_distance=True)
        held.add(rows)
        if held.search(rows, 1)[1][:, 0].tolist() != [*range(8)]:
            raise RuntimeError("it finds wrong rows")


class FaissHeld:
    """`device.Held`, by FAISS."""

    def __init__(self, gpu: FaissGpu, flat: Any) -> None:
        self._gpu = gpu
        self._flat = flat

    def __del__(self) -> None:
        self._gpu.drop(self._flat)

    def add(self, vectors: Vectors) -> None:
        """Copy rows (n, dimension) there; raises RuntimeError where there is no room."""
        with self._gpu.alone():
            self._flat.add(vectors)

    def search(self, queries: Vectors, count: int) -> tuple[Vectors, Rows]:
        """The best of the rows, as `device.Held` says."""
        with self._gpu.alone():
            found: tuple[Vectors, Rows] = self._flat.search(queries, count)
        return found


def open_faiss(number: int) -> FaissGpu | None:
    """`device.Open`, by FAISS. None where the installed one knows no GPU."""
    if not hasattr(faiss, "StandardGpuResources"):
        return None
    wrong = _tried(number)
    if wrong is not None:
        raise RuntimeError(f"FAISS: {wrong}")
    return FaissGpu(number)


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
