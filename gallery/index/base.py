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


#: key beside an index's parameters, of other parameters: they suffice where the index is a small part of those that it is
#: joined with. What earlier versions wrote under `joined` may be too little (ADR 0049), and is not read.
JOINED = "joined_by_ten"
#: key beside the parameters of an index of lists: how far away lists may be to be read, see `gallery.index._reach`
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
    """Which indexes an index can be joined with.

    Attributes:
        key: indexes of one model with equal keys can be joined.
        rows: the most rows that the joined index may have.
    """

    key: Hashable
    rows: int


class Index(Protocol):
    """A sealed set of vectors that answers searches; safe from many threads."""

    kind: str
    #: decides the score
    space: Space
    #: None for one that cannot be joined with others
    joins: Joins | None

    @property
    def reads(self) -> int:
        """About how many numbers one query reads: what a search costs."""

    def search(
        self, queries: Vectors, k: int, selected: Selected | None = None, assigned: Assignments | None = None
    ) -> Found:
        """The `k` best rows for each query.

        Args:
            queries: (queries, dimension) float32, C-contiguous; of unit length where the metric is cosine.
            k: how many rows, at least 1; may exceed the number of rows.
            selected: the rows that may be found. None means all.
            assigned: the lists nearest to these very queries, as searches of other segments found them; this one uses them
                and adds to them. The answer does not depend on it.
        """

    def prepare(self) -> None:
        """Make now what searches need and what takes long to make, so that the first search does not wait for it."""

    def join(self, others: Sequence[Index]) -> Index:
        """One index over its own rows followed by those of `others`, whose `joins` have the same key."""


@runtime_checkable
class Steered(Index, Protocol):
    """An index of lists, of which a search can be made to read fewer or more without opening it again."""

    def steered(self, parameters: Mapping[str, Any]) -> Index:
        """The same index, searched by other parameters of its backend's `efforts`."""

    def places(self, queries: Vectors, rows: Rows) -> Rows:
        """For rows (queries, n): how many lists a search of the query reads before the one that holds the row, (queries, n)."""


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

        They differ only in what steers a search, so that one build serves all. They end where a search would cost as much
        as an exact one; there are none where nothing can be steered.

        `total` is how many rows the gallery has if it has more than this segment: the lists that segments share are made for
        all of them.
        """

    def check(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with defaults filled in.

        Raises:
            ValueError: a parameter is unknown or out of range; the message names it and the fix.
        """


class Trained(NamedTuple):
    """What training gives, and what the lists of several segments can share.

    Attributes:
        centroids: (lists, dimension) float32; a row is in the list of the nearest one.
        codebook: (parts, 16, dimension / parts) float32: the values that each part of a vector is rounded to. None where
            lists do not hold such codes.
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
        """As every backend does, with the lists of `trained`; where that is None, lists are trained with the column."""

    def lists(self, parameters: Mapping[str, Any], rows: int, trainable: int) -> int:
        """How many lists suit a gallery of `rows` rows, where `trainable` rows can be trained with."""

    def serves(self, parameters: Mapping[str, Any], lists: int, now: int) -> bool:
        """Whether a gallery can keep its `lists` lists, though it would `now` get another number."""

    def train(self, rows: Vectors, lists: int, space: Space, rounds: int) -> Trained:
        """Train with prepared (rows, dimension) float32, at least one row; the same rows give the same result."""

    def trained(self, path: Path) -> Trained:
        """What the index file at `path` was built with; raises RuntimeError where it cannot be read."""
