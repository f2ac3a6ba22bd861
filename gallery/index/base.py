"""What an index is: a reader that searches, and a backend that builds and opens readers.

Readers are narrower than writers, so nothing that holds an index can change it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from gallery.arrays import Rows, Space, Stored, Vectors

if TYPE_CHECKING:
    from gallery.index.quantizer import Assignments
    from gallery.index.selection import Selected


#: beside an index's parameters: others, that suffice where it is a small part of what it is joined with. What an
#: earlier version wrote as `joined` may be too little (ADR 0049), and is not heeded.
JOINED = "joined_by_ten"
#: beside them, of an index of lists: how far those may be that are read, see `gallery.index._reach`
REACH = "reach"


class Found(NamedTuple):
    """The best rows of an index for each query, best first.

    Attributes:
        scores: (queries, k) float32; similarity for cosine and inner product (larger is better), Euclidean distance
            (not squared; smaller is better) for euclidean. Padded with the worst value where there are fewer rows.
        rows: (queries, k) int64; -1 where there is no row.
    """

    scores: Vectors
    rows: Rows


class Joins(NamedTuple):
    """With what an index can be made one.

    Attributes:
        key: equal for indexes of one model that can be.
        rows: as many as one index may then have.
    """

    key: Hashable
    rows: int


class Index(Protocol):
    """A sealed set of vectors that answers searches; safe from many threads."""

    kind: str
    #: decides the score
    space: Space
    #: None where it is always asked alone
    joins: Joins | None

    @property
    def reads(self) -> int:
        """Numbers that are read for one query, more or less."""

    def search(
        self, queries: Vectors, k: int, selected: Selected | None = None, assigned: Assignments | None = None
    ) -> Found:
        """The `k` best rows for each query.

        Args:
            queries: (queries, dimension) float32, C-contiguous; of unit length where the metric is cosine.
            k: how many rows, at least 1; may exceed the number of rows.
            selected: the rows that may be found. None means all.
            assigned: what was found out about the very same queries for other segments, to be used and added to. The
                answer does not depend on it.
        """

    def prepare(self) -> None:
        """Make what searches need and what takes long, so that the first of them need not."""

    def join(self, others: Sequence[Index]) -> Index:
        """One index over its own rows and those of `others`, in turn, whose `joins` have the same key."""


@runtime_checkable
class Steered(Index, Protocol):
    """An index of which fewer or more lists can be read, without opening it again."""

    def steered(self, parameters: Mapping[str, Any]) -> Index:
        """The same index, searched by other parameters of its backend's `efforts`."""

    def places(self, queries: Vectors, rows: Rows) -> Rows:
        """At which place among the lists of each query those of rows (queries, n) are read: (queries, n), the first at 0."""


class Backend(Protocol):
    """A way to build an index file from a column and to open it for reading."""

    name: str

    def build(self, vectors: Stored, *, space: Space, path: Path, parameters: Mapping[str, Any]) -> bool:
        """Write an index of `vectors` to `path`; False where this backend needs no file (exact search).

        Args:
            vectors: (rows, dimension) float32 or float16, usually memory-mapped, never changed.
            space: decides the score.
            path: where to write; the caller syncs, renames and digests it.
            parameters: the backend's own settings, already checked by `check`.
        """

    def open(self, vectors: Stored, *, space: Space, path: Path | None, parameters: Mapping[str, Any]) -> Index:
        """Open the index at `path` over `vectors`, memory-mapped where the backend can.

        Args:
            vectors: the column it was built from; the index keeps it, for exact scores.
            space: the one it was built for.
            path: what `build` wrote; None where `build` returned False.
            parameters: as `check` returned them; those that steer a search (`nprobe`, `ef_search`) may differ from
                those at build time, and what was measured of the index may stand beside them: `JOINED`, `REACH`.
        """

    def efforts(self, rows: int, total: int | None = None) -> Sequence[Mapping[str, Any]]:
        """Parameters to try on a segment of `rows` rows until its recall is good enough, the cheapest search first.

        `total` is how many rows the gallery has, where it is not this segment alone: lists that segments share are made
        for all of them.

        They differ only in what steers a search, so that one build serves all. The list ends where a search would cost as
        much as an exact one, and is empty where there is nothing to steer.
        """

    def check(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with defaults filled in.

        Raises:
            ValueError: a parameter is unknown or out of range; the message names it and the fix.
        """


class Trained(NamedTuple):
    """What the lists of several segments can have in common.

    Attributes:
        centroids: (lists, dimension) float32; a row is in the list of the nearest one.
        codebook: (parts, 16, dimension / parts) float32: what a part of a vector may be written as. None where lists do not
            hold codes of that kind.
    """

    centroids: Vectors
    codebook: Vectors | None = None


@runtime_checkable
class ListsBackend(Backend, Protocol):
    """A backend that puts rows into lists by trained centroids, which the segments of a gallery can share."""

    #: whether its indexes heed `REACH`
    reaches: bool

    def build(
        self,
        vectors: Stored,
        *,
        space: Space,
        path: Path,
        parameters: Mapping[str, Any],
        trained: Trained | None = None,
    ) -> bool:
        """As any backend does, with the lists of `trained`; None trains some with the column."""

    def lists(self, parameters: Mapping[str, Any], rows: int, trainable: int) -> int:
        """How many lists suit a gallery of `rows` rows, where `trainable` rows can be trained with."""

    def serves(self, parameters: Mapping[str, Any], lists: int, now: int) -> bool:
        """Whether a gallery that would `now` be given so many lists can go on with `lists`."""

    def train(self, rows: Vectors, lists: int, space: Space, rounds: int) -> Trained:
        """Train with (rows, dimension) float32 that are prepared, at least one; the same rows give the same."""

    def trained(self, path: Path) -> Trained:
        """What an index file was built with; raises RuntimeError where it cannot be read."""
