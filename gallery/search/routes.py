"""Which space an answer is scored in, and by which route each segment is searched. Pure: no input, no output.

One score space is chosen for the whole answer, so that all its scores compare without calibration:

1. the query model's own space, if every segment reaches it;
2. else another space that the query reaches, if every segment reaches it too;
3. else the search is refused, unless a partial answer is allowed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from gallery import errors
from gallery.paths import Path, feeds, paths
from gallery.spaces import Registry, Transformation

#: most forward transformations in a row at query time: each adds its error, and its cost per candidate
LONGEST = 3


class Route(StrEnum):
    """How a segment is searched."""

    DIRECT = "direct"
    FORWARD = "forward"
    BACKWARD = "backward"


class SegmentFacts(NamedTuple):
    """What a plan depends on of a segment."""

    #: (model that it has a published column of, how many transformations made that; 0 where it is native)
    columns: frozenset[tuple[str, int]]
    #: width of its side-information, null if none
    side_dimension: int | None
    #: live rows
    live: int

    @property
    def models(self) -> list[str]:
        """The models that it has published columns of, by name."""
        return sorted(model for model, _ in self.columns)


class Way(NamedTuple):
    """How one segment reaches the score space."""

    route: Route
    #: the model whose column is searched
    column: str
    #: what maps its candidates into the score space, one after the other; empty for `direct`
    by: tuple[Transformation, ...]
    #: the query has no vector in the column's space, so every row is a candidate
    exhaustive: bool = False


class Coverage(NamedTuple):
    """Live items by the route that reached them."""

    direct: int
    forward: int
    backward: int
    unreachable: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How one search will be done."""

    score_space: str
    #: maps the query into a space; by the space's name, for the spaces in which it is not known
    query_by: Mapping[str, Transformation]
    #: per segment, in the snapshot's order; None where it cannot be reached
    ways: tuple[Way | None, ...]
    coverage: Coverage


@dataclass(frozen=True, slots=True)
class Known:
    """What a planner may use: the query's vectors, the transformations, and what upgrades are pinned to."""

    query_model: str
    companions: Collection[str]
    registry: Registry
    pinned: Mapping[tuple[str, str], str]
    zeros_for: Collection[str]

    def query_by(self, space: str) -> Transformation | None:
        """The backward transformation that maps the query into a space."""
        return self.registry.between(self.query_model, space, "backward", self.pinned)

    def is_known_in(self, space: str) -> bool:
        """Whether the query has a vector in a space, given or mapped."""
        return space == self.query_model or space in self.companions or self.query_by(space) is not None

    def feeds(self, path: Path, segment: SegmentFacts) -> bool:
        """Whether a segment has the side-information that a path needs, or zeros may stand for it."""
        return all(feeds(each, segment.side_dimension, zeros=each.name in self.zeros_for) for each in path.by)

    def paths(self, segment: SegmentFacts, space: str) -> list[Path]:
        """How a segment's vectors come into a space, the best first.

        Paths that end with a transformation that an upgrade is pinned to go first: it has made columns of that space already.
        """
        pairs = dict.fromkeys((t.source, t.target) for t in self.registry.transformations if t.direction == "forward")
        found = [self.registry.between(*pair, "forward", self.pinned) for pair in pairs]
        pinned = self.pinned.values()
        return sorted(
            paths(dict(segment.columns), space, [t for t in found if t is not None], longest=LONGEST),
            key=lambda path: path.by[-1].name not in pinned,
        )


def plan(known: Known, segments: Sequence[SegmentFacts], *, allow_partial: bool = False) -> Plan:
    """Choose the score space and a way for each segment.

    Raises:
        NoRoute: some segment cannot be reached and no partial answer is allowed.
    """
    cache: dict[tuple[frozenset[tuple[str, int]], int | None, str], Way | None] = {}

    def way(segment: SegmentFacts, space: str) -> Way | None:
        """Plan segments that are alike once: a gallery has many segments, but few kinds of them."""
        key = (segment.columns, segment.side_dimension, space)
        if key not in cache:
            cache[key] = _way(known, segment, space)
        return cache[key]

    plans: list[Plan] = []
    for space in _spaces(known, segments):
        found = _plan(known, space, segments, tuple(way(segment, space) for segment in segments))
        if found.coverage.unreachable == 0:
            return found
        plans.append(found)
    if not allow_partial:
        raise errors.NoRoute(_advice(known, segments, plans[0]))
    return min(plans, key=lambda p: p.coverage.unreachable)


def _spaces(known: Known, segments: Sequence[SegmentFacts]) -> Iterator[str]:
    """The query model's own space, then the others that the query reaches, by name.

    A column of such a space need not be there: once an upgrade from it is finalized, only a backward transformation leads there.
    """
    yield known.query_model
    stored = {model for segment in segments for model in segment.models}
    targets = {t.target for t in known.registry.transformations if t.source == known.query_model}
    for space in sorted((stored | targets | set(known.companions)) - {known.query_model}):
        if known.is_known_in(space):
            yield space


def _plan(known: Known, space: str, segments: Sequence[SegmentFacts], ways: tuple[Way | None, ...]) -> Plan:
    live = dict.fromkeys(Route, 0)
    unreachable = 0
    for segment, way in zip(segments, ways, strict=True):
        if way is None:
            unreachable += segment.live
        else:
            live[way.route] += segment.live
    asked = {space} | {way.column for way in ways if way is not None and not way.exhaustive}
    mapped = {name: known.query_by(name) for name in asked - {known.query_model} - set(known.companions)}
    return Plan(
        score_space=space,
        query_by={name: transformation for name, transformation in mapped.items() if transformation is not None},
        ways=ways,
        coverage=Coverage(live[Route.DIRECT], live[Route.FORWARD], live[Route.BACKWARD], unreachable),
    )


def _way(known: Known, segment: SegmentFacts, space: str) -> Way | None:
    if space in segment.models:
        return Way(Route.DIRECT, space, ())
    return _forward(known, segment, space) or _backward(known, segment, space)


def _forward(known: Known, segment: SegmentFacts, space: str) -> Way | None:
    for path in known.paths(segment, space):
        if known.is_known_in(path.column) and known.feeds(path, segment):
            return Way(Route.FORWARD, path.column, path.by)
    return None


def _backward(known: Known, segment: SegmentFacts, space: str) -> Way | None:
    """Search a newer column by the query's own vector in that space, if it has one; else map every row of the segment."""
    ways = [
        Way(Route.BACKWARD, model, (transformation,), exhaustive=not known.is_known_in(model))
        for model in segment.models
        if (transformation := known.registry.between(model, space, "backward", known.pinned)) is not None
    ]
    return min(ways, key=lambda way: way.exhaustive, default=None)


def _advice(known: Known, segments: Sequence[SegmentFacts], own: Plan) -> str:
    """Name both models, and what would help in the query model's own space."""
    lost = [segment for segment, way in zip(segments, own.ways, strict=True) if way is None]
    stored = sorted({model for segment in lost for model in segment.models})
    query, others = known.query_model, " or ".join(stored)
    forward = [(path, known.feeds(path, segment)) for segment in lost for path in known.paths(segment, query)]
    if forward:
        path, usable = max(forward, key=lambda found: found[1])
        names = " and ".join(each.name for each in path.by)
        help_ = (
            f"send the query's {path.column} vector in `companions`, so that {names} can be used"
            if usable
            else f"{names} needs side-information, which these items do not have"
        )
    elif unadvised := [
        each.name
        for each in known.registry.transformations
        if not each.advised and each.target == query and each.source in stored
    ]:
        help_ = (
            f"{', '.join(unadvised)} leads there, but its fit said that it gains nothing by itself: an upgrade that names it "
            "uses it"
        )
    else:
        help_ = (
            f"register a forward transformation from {others} to {query} and send companions, or a backward "
            f"transformation from {query} to {others} or from {others} to {query}"
        )
    return (
        f"{own.coverage.unreachable} items have vectors of {others} only, which a query of {query} does not reach: "
        f"{help_}; or set `allow_partial` to search the rest"
    )
