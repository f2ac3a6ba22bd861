"""Indexes on a GPU: all rows of a shelf in its memory, compared there with every query.

A shelf has a million rows at the most, which a GPU compares sooner than a CPU walks an index of them, and without missing
any. It computes as `flat` does with many queries on a CPU: by a matrix product in float32, which proposes a few rows more than
are wanted; those are scored exactly from the column, and a query for which rounding may have hidden a row is asked again
([ADR 0050](docs/adr/0050-a-gpu-is-tried-first-and-proves-what-it-finds.md)). Which library holds the rows and compares them
is not known here: FAISS (`faiss_gpu`) and PyTorch (`models/nearest.py`) can
([ADR 0051](docs/adr/0051-pytorch-compares-on-gpus-that-faiss-does-not-know.md)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import structlog

from gallery.arrays import Rows, Space, Stored, Vectors
from gallery.index import _exact, _faiss
from gallery.index.base import Found, Index
from gallery.index.quantizer import Assignments
from gallery.index.selection import Selected
from gallery.index.stack import Stack

AUTO, CPU = "auto", "cpu"
#: the most rows that a GPU proposes for a query
MOST = 2048
# Proposed beyond two rows for each wanted one, so that hardly any query is asked again.
_MORE = 32
#: fewer rows than this are compared on the CPU, which takes less time than to ask a GPU
FEWEST_ROWS = 10_000

log = structlog.get_logger()


class NoSuchDevice(ValueError):
    """There is no such GPU, or no installed library can use it."""


class Held(Protocol):
    """Rows in the memory of a GPU, until this object is garbage; many threads may search them at once."""

    def add(self, vectors: Vectors) -> None:
        """Copy float32 rows (n, dimension) to the GPU; raises RuntimeError if it has no room."""

    def search(self, queries: Vectors, count: int) -> tuple[Vectors, Rows]:
        """The best `count` rows for float32 queries (n, dimension), by a matrix product in float32.

        Returns:
            Squared distances or inner products, and rows, both (n, count); the row is -1 where the score is not a number.

        Raises:
            RuntimeError: there is no room to compute, or the GPU fails.
        """


class Gpu(Protocol):
    """A GPU that was tried, and works."""

    def hold(self, rows: int, dimension: int, *, by_distance: bool) -> Held:
        """Make room for rows that are compared by distance, or else by inner product; raises RuntimeError if there is none."""


#: opens a GPU by its number: None if the library sees no GPU at all, RuntimeError if it cannot use the one it sees
Open = Callable[[int], Gpu | None]


class DeviceIndex(_faiss.FaissIndex):
    """An index that compares every row, on a GPU."""

    def __init__(self, held: Held, longest: float, *, vectors: Stored | Stack, space: Space) -> None:
        """`held` has the rows of `vectors`; `longest` is the length of the longest."""
        super().__init__("device", vectors=vectors, space=space)
        self._held = held
        self._longest = longest
        self._told = False

    @property
    def reads(self) -> int:
        """Few numbers: it says how long the calling thread is busy, and the GPU does the work."""
        return FEWEST_ROWS * int(self._column.shape[1])

    def compared(self, k: int, *, roughly: bool = False) -> int:
        """Twice as many as wanted, and some more; `roughly`, only the some more."""
        return k + _MORE if roughly else 2 * k + _MORE

    def _found(self, assigned: Assignments, k: int, count: int, effort: float, selected: Selected | None) -> Found:
        if count <= MOST:
            try:
                if assigned.roughly:
                    return super()._found(assigned, k, count, effort, selected)
                return self._proven(assigned.queries, k, count, selected)
            except RuntimeError as error:  # which is how FAISS and PyTorch say that the memory is full
                self._tell(error)
        return _exact.search_column(assigned.queries, self._column, k, self.space, selected)

    def _tell(self, error: RuntimeError) -> None:
        """Log it once: what failed may fail for every search from now on."""
        if not self._told:
            self._told = True
            log.warning("gpu_search_failed", rows=len(self._column), reason=reason(error))

    def _propose(self, assigned: Assignments, count: int, effort: float) -> Rows:  # noqa: ARG002
        return self._held.search(assigned.queries, count)[1]

    def _proven(self, queries: Vectors, k: int, count: int, selected: Selected | None) -> Found:
        """The `k` best of `count` proposed rows. Where others may be better, of `MOST` proposed ones, and then of all rows."""
        products, rows = self._held.search(queries, count)
        found = self._ranked(queries, k, rows, selected)
        if count < len(self._column):
            proven = _exact.beyond_doubt(found.scores[:, -1], products, queries, self._longest, self.space.metric)
            # A score that overflowed is no number, and its row is not proposed: then rows are missing.
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
    """Where the indexes of a process live: on one GPU, or on none."""

    def __init__(self, name: str, opens: Sequence[Open]) -> None:
        """`auto` takes a GPU if there is one that works, `cpu` none, `cuda` the first, `cuda:1` the second.

        Args:
            name: as in the settings.
            opens: one function for each library that may be able to use the GPU, the best first.

        Raises:
            NoSuchDevice: the message says what would help.
        """
        number = _number(name)
        self._gpu = None if number is None else _opened(name, number, opens)
        self._told = False

    def place(self, index: Index, columns: Sequence[Stored]) -> Index:
        """An index of a shelf's rows on the GPU; or `index`, prepared, if there is no GPU, no room on it, or the rows are few."""
        vectors = Stack(columns)
        if self._gpu is not None and len(vectors) >= FEWEST_ROWS:
            try:
                return _placed(self._gpu, vectors, index.space)
            except RuntimeError as error:
                self._tell(len(vectors), error)
        index.prepare()
        return index

    def _tell(self, rows: int, error: RuntimeError) -> None:
        """Log it once: a GPU that is full is so for each shelf that comes."""
        if not self._told:
            self._told = True
            log.warning("gpu_not_used", rows=rows, reason=reason(error))


def reason(error: RuntimeError) -> str:
    """The first line of the message; PyTorch adds lines on how to debug it."""
    return str(error).partition("\n")[0]


def _placed(gpu: Gpu, vectors: Stack, space: Space) -> DeviceIndex:
    held, longest = gpu.hold(*vectors.shape, by_distance=space.metric == "euclidean"), 0.0
    for column in vectors.columns:
        for start in range(0, len(column), _exact.BLOCK):
            part = column[start : start + _exact.BLOCK]
            # The GPU must hold what is scored: vectors that are of unit length but for rounding are not rounded again.
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
    return wanted


def _opened(name: str, number: int, opens: Sequence[Open]) -> Gpu | None:
    wrong = list[str]()
    for each in opens:
        try:
            gpu = each(number)
        except RuntimeError as error:
            wrong.append(reason(error))
        else:
            if gpu is not None:
                log.info("gpu_used", number=number, by=type(gpu).__module__)
                return gpu
    if name == AUTO:
        if wrong:
            log.warning("gpu_not_used", reason="; ".join(wrong))
        return None
    why = "; ".join(wrong) or "neither PyTorch nor FAISS sees a GPU"
    raise NoSuchDevice(f"indexes cannot live on {name!r} ({why}): mend that, or set FORWARDFILL_INDEX_DEVICE=cpu")
