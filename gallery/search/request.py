"""A search as values: what is asked and what is found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gallery.arrays import Origin, Rows, Vectors
from gallery.search.routes import Coverage
from gallery.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """Queries of one model over one gallery."""

    #: the model that embedded the queries
    model: str
    #: (queries, dimension) as accepted by `gallery.vectors.accept`
    vectors: Vectors
    #: hits per query
    k: int
    #: the same queries embedded by other models, by model name
    companions: Mapping[str, Vectors] = field(default_factory=dict)
    #: payload condition, see `gallery.catalog.filters`
    filter: Mapping[str, Any] | None = None
    #: answer from the segments that can be reached, rather than refuse
    allow_partial: bool = False
    #: candidates per hit on forward and backward routes
    oversample: int | None = None


class Hit(NamedTuple):
    """One found item."""

    id: str
    score: float
    origin: Origin
    #: where its payload is kept
    place: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found, as arrays; Python objects are made when asked for, by `hits`."""

    snapshot: Snapshot
    score_space: str
    coverage: Coverage
    #: (queries, k) float32, best first
    scores: Vectors
    #: (queries, k) int64: position of the segment in the snapshot, -1 where there are no more hits
    segments: Rows
    #: (queries, k) int64
    rows: Rows
    #: per segment of the snapshot: where the scored vectors came from
    origins: Sequence[Origin]

    def hits(self, query: int) -> list[Hit]:
        """The hits of one query, best first."""
        views = self.snapshot.segments
        return [
            Hit(views[at].ids[row], score, self.origins[at], (views[at].id, row))
            for at, row, score in self._found(query)
        ]

    def plain(self, query: int) -> list[tuple[str, float, Origin]]:
        """The id, score and origin of the hits of one query, best first: what most searches want, for half of the time."""
        views, origins = self.snapshot.segments, self.origins
        return [(views[at].ids[row], score, origins[at]) for at, row, score in self._found(query)]

    def _found(self, query: int) -> Iterator[tuple[int, int, float]]:
        """The segment, row and score of each hit."""
        arrays = (self.segments[query].tolist(), self.rows[query].tolist(), self.scores[query].tolist())
        return (each for each in zip(*arrays, strict=True) if each[0] >= 0)
