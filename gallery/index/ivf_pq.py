"""Inverted lists of codes of four bits for two numbers each: a sixteenth of the memory, compared 32 rows at a time.

A product quantizer writes each pair of numbers as the nearest of 16 pairs, and FAISS's FastScan compares codes within
registers (André, Kermarrec, Le Scouarnec, "Quicker ADC", 2019; Johnson, Douze, Jégou, "Billion-scale similarity search with
GPUs", 2017). Codes only propose: more rows than wanted are scored exactly from the column.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from gallery.arrays import Mask, Space, Stored, Vectors
from gallery.index import _exact, _faiss, _ivf, _reach
from gallery.index._library import faiss
from gallery.index._parameters import Whole
from gallery.index._reach import EVERYWHERE, Reach
from gallery.index.base import JOINED, REACH, Found, Index, Joins, Trained
from gallery.index.quantizer import THOROUGH, Assignments, Nearest, digest, train
from gallery.index.scores import cut
from gallery.index.selection import Selected
from gallery.index.stack import Stack

# To join this many rows takes a tenth of a second, and they are joined again with each new segment.
JOINED_ROWS = 1 << 20
# The codes of this many rows are compared in the time that a search of a graph takes.
READ_ROWS = 1 << 16
# How many hits a usual search wants: what an index needs was measured with these.
_TEN = 10
# The share of the joined rows whose segments may need more lists than are read: what a segment needs is an estimate, from
# 200 of its rows.
_FEW = 0.1
BITS = 4
CODES = 1 << BITS
# Training rows for each code; FAISS warns below 39. With 128 no more queries are asked twice than with 256, and training
# takes half as long.
_ROWS_PER_CODE = 128
# Candidates beyond `rerank` for each wanted row: where few rows are wanted, rounding decides more. With this many, at most
# one query in eleven on CIFAR-100 embeddings has to be asked twice.
_MORE = 108
# A row is not missed unless its code is wrong by more than this many standard deviations. Of vectors of independent noise,
# which are all about equally far apart, 2 missed one in 16 of the best ten, and 3 one in 500.
_SPREADS = 3
# A reach was measured with the ten nearest of all rows. A search for more hits, or of selected rows, multiplies it by how
# much harder it is; from this many times as hard on, it reads lists at any distance.
_HARDER = 2
# To choose lists by their distance takes as long as to compare codes of a few thousand rows, so it pays from here on.
_CHOOSY_ROWS = 1 << 15
# FAISS's number for going through the lists query by query, so that no answer depends on the batch, with a reservoir of
# candidates: for 128 of them that took 39 us where a heap took 50, and for 508 it took 49 where the heap took 120.
_QUERY_BY_QUERY = 11


_Needed = TypeVar("_Needed", int, Reach)


class Effort(NamedTuple):
    """Which lists to read: the nearest `nprobe`, and of these only those within `reach`."""

    nprobe: int
    reach: Reach


class Needs(NamedTuple):
    """Which lists to read of the index of one segment.

    Attributes:
        rows: of the segment.
        alone: if it is searched by itself.
        joined: if it is at most a tenth of the rows that are searched together.
    """

    rows: int
    alone: Effort
    joined: Effort


def _enough(parts: Sequence[Needs]) -> Effort:
    """Which lists suffice for most of the rows of segments that are searched together.

    What a segment needs was measured with the neighbours of its rows within it. Among the rows of all segments the nearest are
    nearer, and in fewer lists. But they may all be in one large segment, so rows count here, and not segments.
    """
    total = sum(part.rows for part in parts)
    efforts = [part.joined if _TEN * part.rows <= total else part.alone for part in parts]
    rows = [part.rows for part in parts]
    return Effort(_for_most([each.nprobe for each in efforts], rows), _for_most([each.reach for each in efforts], rows))


def _for_most(needed: Sequence[_Needed], rows: Sequence[int]) -> _Needed:
    """The least of what parts `needed` that suffices for all but a share `_FEW` of their rows."""
    at, left = 0, sum(rows)
    few, parts = _FEW * left, sorted(zip(needed, rows, strict=True))
    while (left := left - parts[at][1]) > few:
        at += 1
    return parts[at][0]


class PqIndex(_ivf.IvfIndex):
    """Lists of codes, of one segment or of several that share centroids and codebook; in memory, in FastScan's blocks.

    The blocks are made from the mapped files when they are first needed: a segment that is searched together with others
    never needs blocks of its own.
    """

    def __init__(
        self, files: Sequence[_File], *, needs: Sequence[Needs], rerank: int, vectors: Stored | Stack, space: Space
    ) -> None:
        effort = _enough(needs)
        super().__init__("ivf_pq", files[0].centroids, nprobe=effort.nprobe, vectors=vectors, space=space)
        self.files = files
        self.needs = needs
        self.rerank = rerank
        read = self.nprobe * len(vectors) // max(1, len(self.quantizer))
        self._reach = effort.reach if read >= _CHOOSY_ROWS else EVERYWHERE
        self.joins = Joins((files[0].key, space), JOINED_ROWS)
        self._by_distance = _exact.rough_metric(space) == faiss.METRIC_L2

    @property
    def reads(self) -> int:
        """An eighth of what other lists read: codes are compared in an eighth of the time."""
        return super().reads // 8

    def join(self, others: Sequence[Index]) -> Index:
        """The lists of all, of which a search reads what `_enough` says."""
        joined = [each for each in (self, *others) if isinstance(each, PqIndex)]
        return PqIndex(
            [file for each in joined for file in each.files],
            needs=[part for each in joined for part in each.needs],
            rerank=max(each.rerank for each in joined),
            vectors=Stack([column for each in joined for column in each.columns]),
            space=self.space,
        )

    def steered(self, parameters: Mapping[str, Any]) -> PqIndex:
        """The same blocks, of which a search reads the lists that `parameters` say."""
        other = PqIndex(
            self.files,
            needs=[Needs(part.rows, _effort(parameters), _effort(parameters)) for part in self.needs],
            rerank=parameters["rerank"],
            vectors=self._column,
            space=self.space,
        )
        other.__dict__["lists"] = self.lists
        return other

    @property
    def columns(self) -> Sequence[Stored]:
        """The columns that the files were built from."""
        return self._column.columns if isinstance(self._column, Stack) else [self._column]

    def compared(self, k: int, *, roughly: bool = False) -> int:
        """`rerank` rows for each wanted one, and some more; `roughly`, a quarter more than wanted, and some more."""
        return k + k // 4 + _MORE // 4 if roughly else self.rerank * k + _MORE

    def prepare(self) -> None:
        """Make the blocks now: for a million rows that takes a tenth of a second, which no search should wait for."""
        self.lists  # noqa: B018 - it is kept

    @cached_property
    def lists(self) -> Any:
        """The blocks that FAISS searches. Two threads may make them at once; they are the same."""
        return _in_blocks(self.files, self.space)

    def _near(self, assigned: Assignments, effort: float) -> Nearest | None:
        """None also where no other index is asked and queries are few: FAISS then compares the centroids just as we would."""
        if assigned.alone and effort == 1 and len(assigned.queries) < _exact.PRODUCT_QUERIES:
            return None
        return self._lists_near(assigned, effort)

    def _found(self, assigned: Assignments, k: int, count: int, effort: float, selected: Selected | None) -> Found:
        if assigned.roughly:
            return super()._found(assigned, k, count, effort, selected)
        harder = effort * max(1.0, k / _TEN)
        if self._reach.times == inf or harder > _HARDER:
            return self._proven(assigned.queries, k, count, self._near(assigned, effort), None, selected)
        near = self._lists_near(assigned, effort)
        return self._reached(
            assigned.queries, k, count, near, self._reach._replace(times=harder * self._reach.times), selected
        )

    def _reached(
        self, queries: Vectors, k: int, count: int, near: Nearest, reach: Reach, selected: Selected | None
    ) -> Found:
        """As `_proven`, from the lists within `reach` only; from all of `near` for queries that found too few rows there."""
        found = self._proven(queries, k, count, _reach.within(near, reach, self.space), None, selected)
        short = np.flatnonzero(found.rows[:, -1] < 0)
        if len(short):
            all_ = near.part(short, slice(None))
            found.scores[short], found.rows[short] = self._proven(queries[short], k, count, all_, None, selected)
        return found

    def _within(self, queries: Vectors, k: int, near: Nearest, selected: Selected, *, roughly: bool) -> Found:
        if roughly:
            return super()._within(queries, k, near, selected, roughly=roughly)
        return self._proven(queries, k, min(self.compared(k), selected.count), near, selected, None)

    def _proven(
        self, queries: Vectors, k: int, count: int, near: Nearest | None, reads: Selected | None, keeps: Selected | None
    ) -> Found:
        """The `k` best rows of some lists: with twice as many candidates each time, until no other row can well be better.

        Args:
            queries: (queries, dimension) float32.
            k: how many rows.
            count: candidates to begin with.
            near: the lists; None for the usual ones.
            reads: FAISS proposes only these rows. None means all.
            keeps: of what FAISS proposes only these rows are kept. None means all.
        """
        found, doubtful = self._once(queries, k, count, near, reads, keeps)
        while doubtful and count < len(self._column):
            count *= 2
            again = None if near is None else near.part(np.array(doubtful), slice(None))
            better, still = self._once(queries[doubtful], k, count, again, reads, keeps)
            found.scores[doubtful], found.rows[doubtful] = better
            doubtful = [doubtful[at] for at in still]
        return found

    def _once(
        self, queries: Vectors, k: int, count: int, near: Nearest | None, reads: Selected | None, keeps: Selected | None
    ) -> tuple[Found, list[int]]:
        """The `k` best of `count` candidates, and for which queries there might be better ones among the others."""
        read = self._read(queries, min(count, len(self._column)), near, reads)
        rows = _faiss.only(read.rows, keeps)
        scores = _exact.scores_of(queries, rows, self._column, self.space)
        found = Found(*cut(scores, rows, self.space.metric, k))
        kept = None if keeps is None else rows >= 0
        doubtful = [
            at
            for at in range(len(queries))
            # Not where fewer rows than wanted are kept (the caller sees that, and looks further), nor where FAISS found
            # fewer than it was asked for: then there is no other row in those lists.
            if found.rows[at, -1] >= 0 <= read.rows[at, -1]
            and not self._beyond_doubt(
                read.scores[at], scores[at], None if kept is None else kept[at], float(found.scores[at, -1])
            )
        ]
        return found, doubtful

    def _beyond_doubt(self, coded: Vectors, scores: Vectors, kept: Mask | None, last: float) -> bool:
        """Whether hardly any row that FAISS did not propose is as good as the last that was found, for one query.

        By its code, such a row is farther than the last candidate. How wrong codes are is seen from the candidates, of which
        both the score by code and the exact one are known. (One query at a time: that is faster than array operations
        over all of them.)
        """
        wrong = self._costs(scores) - self._codes(coded)
        if kept is not None:
            wrong = wrong[kept]
        mean = float(np.add.reduce(wrong)) / len(wrong)
        variance = float(wrong.dot(wrong)) / len(wrong) - mean * mean
        margin: float = self._codes(coded.item(-1)) + mean - self._costs(last)
        return margin >= 0 and margin * margin >= _SPREADS * _SPREADS * variance

    def _codes(self, coded: Any) -> Any:
        """FAISS's scores by codes, turned so that less is better."""
        return coded if self._by_distance else -coded

    def _costs(self, scores: Any) -> Any:
        """Exact scores on the same scale as `_codes`."""
        if self.space.metric == "euclidean":
            return scores * scores
        return 2 - 2 * scores if self._by_distance else -scores  # by distance, both are of unit length


class _File:
    """An index file, mapped, so that it can be read even after it was removed."""

    def __init__(self, path: Path, centroids: Vectors, codebook: Vectors) -> None:
        self.centroids = centroids
        self.codebook = codebook
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def key(self) -> tuple[str, str]:
        """Equal for files with the same centroids and codebook."""
        return digest(self.centroids), digest(self.codebook)

    def read(self) -> Any:
        """A copy in memory that may be changed; the pages of the file that were read for it are let go."""
        copy = faiss.deserialize_index(np.frombuffer(self._bytes, np.uint8))
        self._bytes.madvise(mmap.MADV_DONTNEED)
        return copy


class Pq(_ivf.Lists):
    """Lists that hold codes."""

    name: ClassVar[str] = "ivf_pq"
    reaches: ClassVar[bool] = True
    parameters: ClassVar[Mapping[str, Whole]] = {
        **_ivf.PARAMETERS,
        "rerank": Whole(default=2, low=1, high=64),
    }

    def open(self, vectors: Stored, *, space: Space, path: Path | None, parameters: Mapping[str, Any]) -> PqIndex:
        """Map the lists; raises ValueError if the file does not fit the column."""
        found = _faiss.mapped(self.name, path, faiss.IO_FLAG_MMAP, vectors)
        assert path is not None  # noqa: S101 - `mapped` refuses None
        file = _File(path, _ivf.centroids_of(found), _codebook_of(found))
        needs = Needs(len(vectors), _effort(parameters), _effort(parameters.get(JOINED, parameters)))
        return PqIndex([file], needs=[needs], rerank=parameters["rerank"], vectors=vectors, space=space)

    def _most(self, lists: int, rows: int) -> int:
        return max(super()._most(lists, rows), lists * min(rows, READ_ROWS) // rows)

    def train(self, rows: Vectors, lists: int, space: Space, rounds: int = THOROUGH.rounds) -> Trained:
        """Centroids, and the codebook: the 16 values that each pair of numbers is rounded to."""
        return Trained(train(rows, lists, space, rounds), _codebook(rows))

    def trained(self, path: Path) -> Trained:
        """What an index file was built with."""
        found = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        return Trained(_ivf.centroids_of(found), _codebook_of(found))

    def _empty(self, trained: Trained, space: Space, vectors: Stored) -> Any:  # noqa: ARG002
        assert trained.codebook is not None  # noqa: S101 - `train` makes one
        lists, dimension = trained.centroids.shape
        by, parts = _ivf.by_distance(trained.centroids), len(trained.codebook)
        index = faiss.IndexIVFPQ(by, dimension, lists, parts, BITS, _exact.rough_metric(space))
        # One table of distances serves all lists: one for each would cost more than to compare the codes of a short list.
        index.by_residual = False
        faiss.copy_array_to_vector(trained.codebook.reshape(-1), index.pq.centroids)
        index.pq.sync_transposed_centroids()  # makes coding rows a fifth faster; not stored
        index.is_trained = True
        return index


def _effort(parameters: Mapping[str, Any]) -> Effort:
    return Effort(parameters["nprobe"], Reach.of(parameters.get(REACH)))


def _parts(dimension: int) -> int:
    """How many parts a vector has: pairs, or single numbers where their count is odd, since all parts have one width."""
    return dimension // 2 if dimension % 2 == 0 else dimension


def _codebook(rows: Vectors) -> Vectors:
    """The values (parts, 16, width) that each part is rounded to, trained with (rows, dimension)."""
    dimension = rows.shape[1]
    pq = faiss.ProductQuantizer(dimension, _parts(dimension), BITS)
    pq.cp.seed = 1
    pq.cp.min_points_per_centroid = 1  # few rows are no reason to print a warning
    pq.cp.max_points_per_centroid = _ROWS_PER_CODE
    pq.train(rows if len(rows) >= CODES else np.resize(rows, (CODES, dimension)))  # fewer rows than codes are repeated
    return _codebook_of_quantizer(pq)


def _codebook_of(index: Any) -> Vectors:
    return _codebook_of_quantizer(index.pq)


def _codebook_of_quantizer(pq: Any) -> Vectors:
    codebook: Vectors = faiss.vector_to_array(pq.centroids).reshape(pq.M, CODES, pq.dsub)
    return codebook


def _in_blocks(files: Sequence[_File], space: Space) -> Any:
    """The lists of all files, one after the other, as FastScan searches them; the nearest lists are `Quantizer.nearest`."""
    whole = files[0].read()
    for file in files[1:]:
        whole.merge_from(file.read(), whole.ntotal)
    blocks = faiss.IndexIVFPQFastScan(whole)
    blocks.implem = _QUERY_BY_QUERY
    centroids = faiss.IndexFlat(blocks.d, _exact.faiss_metric(space.metric))
    centroids.add(files[0].centroids)
    _ivf.choose_lists_by(blocks, centroids)
    # What is in `whole` was copied, and its lists are as large as the blocks: nothing may keep it. To reset it would free none of
    # them.
    blocks.orig_invlists = None
    blocks.referenced_objects = []
    return blocks


BACKEND = Pq()
