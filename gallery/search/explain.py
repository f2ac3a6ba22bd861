"""One search with its plan, where its time went, and what it missed of what exact search finds.

The search is the one that everybody gets: the same `Run`, whose steps are watched. Then every live row of every segment
that it reached is scored in the same space, a block at a time. So explaining takes as long as reading and transforming the
whole gallery, and nobody else pays for it: a search that is not explained has no clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gallery.arrays import Rows, Vectors
from gallery.index.base import Index
from gallery.search.exact import Exact
from gallery.search.mapped import By
from gallery.search.merge import Part
from gallery.search.request import Answer, SearchRequest
from gallery.search.routes import Plan, Way
from gallery.search.run import Run, Searcher, ready_plan_for
from gallery.shelves import Shelf
from gallery.snapshot import World
from gallery.views import SegmentView

STEPS = ("plan", "filter", "ask", "transform", "score", "merge")
_ROUNDING = 1e-6  # of a score: a transformation rounds otherwise in another batch

#: the position of a segment in the snapshot, and a row of it
Place = tuple[int, int]


class Step(NamedTuple):
    """How one shelf was searched."""

    shelf: Shelf
    #: None where the score space is not reached from it, or nothing in it is live
    way: Way | None
    #: rows that came with a score in the score space, to be merged
    candidates: int
    #: milliseconds that its index took
    ask_ms: float


class Recall(NamedTuple):
    """How many of the exact hits were found, or in place of the last of them others that are as good."""

    hits: int
    found: int

    @property
    def share(self) -> float | None:
        """None where there was nothing to find."""
        return self.found / self.hits if self.hits else None


@dataclass(frozen=True, slots=True)
class Explained:
    """A search of one query, and what it was made of."""

    answer: Answer
    plan: Plan
    #: how many rows a segment that is not `direct` is asked for
    candidates: int
    #: per shelf of the snapshot
    steps: tuple[Step, ...]
    #: milliseconds by step, see `STEPS`; each is its own time only
    milliseconds: Mapping[str, float]
    #: the same query scored against every row
    exact: Answer
    #: milliseconds that the exact comparison took
    exact_ms: float

    @property
    def recall(self) -> dict[str, Recall]:
        """By the route of their segments, how many of the exact hits were found."""
        seen = hits_found(_scores(self.answer), _scores(self.exact))
        ways = {at: step.way for step in self.steps for at, _, _ in step.shelf.each()}
        hits: dict[str, list[bool]] = {}
        for place in _scores(self.exact):
            way = ways[place[0]]
            hits.setdefault(way.route if way is not None else "", []).append(place in seen)
        return {route: Recall(len(each), sum(each)) for route, each in sorted(hits.items())}

    @property
    def total_recall(self) -> Recall:
        """How many of all the exact hits were found."""
        each = self.recall.values()
        return Recall(sum(one.hits for one in each), sum(one.found for one in each))

    @property
    def largest_difference(self) -> float | None:
        """Between the two scores of an item that both found; None where there is none.

        A transformation rounds otherwise in another batch, and nothing else may make a difference.
        """
        found, exact = _scores(self.answer), _scores(self.exact)
        return max((abs(found[place] - exact[place]) for place in found.keys() & exact.keys()), default=None)


def hits_found(answer: dict[Place, float], exact: dict[Place, float]) -> set[Place]:
    """Which of the exact hits a search found; both map places to scores, best first.

    Among items that score as the last exact hit does, chance decides which are hits. So another of them counts as found.
    """
    seen = answer.keys() & exact.keys()
    last = next(reversed(exact.values()), 0.0)

    def tied(hits: dict[Place, float]) -> list[Place]:
        return [at for at, score in hits.items() if at not in seen and math.isclose(score, last, rel_tol=_ROUNDING)]

    return seen.union(tied(exact)[: len(tied(answer))])


def explain(searcher: Searcher, world: World, gallery: str, request: SearchRequest) -> Explained:
    """Search one gallery with one query, watched, and compare with exact search.

    Raises:
        GalleryError: as `Searcher.search`.
    """
    clock = _Clock()
    snapshot = world.snapshot(gallery)
    with clock("plan"):
        ready = ready_plan_for(world, snapshot, request)
    with clock("filter"):
        filtered = searcher.filtered(snapshot, request)
    run = _Watched(clock, searcher, world, snapshot, request, ready, filtered)
    with clock("merge"):
        answer = run.answer()
    started = time.perf_counter()
    exact = Exact(run).answer()
    return Explained(
        answer=answer,
        plan=ready.plan,
        candidates=run.candidates,
        steps=tuple(
            Step(
                shelf,
                way,
                sum(run.offered.get(position, 0) for position, _, _ in shelf.each()),
                clock.spent.get(("ask", at), 0.0),
            )
            for at, (shelf, way) in enumerate(zip(snapshot.shelves, ready.plan.ways, strict=True))
        ),
        milliseconds={step: sum(ms for (name, _), ms in clock.spent.items() if name == step) for step in STEPS},
        exact=exact,
        exact_ms=(time.perf_counter() - started) * 1000,
    )


class _Clock:
    """Milliseconds by step and shelf. The time of a step within another does not count for the other."""

    def __init__(self) -> None:
        self.spent: dict[tuple[str, int | None], float] = {}
        self._within: list[float] = []

    @contextmanager
    def __call__(self, step: str, shelf: int | None = None) -> Iterator[None]:
        self._within.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            took = (time.perf_counter() - started) * 1000
            own = took - self._within.pop()
            self.spent[step, shelf] = self.spent.get((step, shelf), 0.0) + own
            if self._within:
                self._within[-1] += took


class _Watched(Run):
    """A search whose steps are timed."""

    def __init__(self, clock: _Clock, *given: Any) -> None:
        super().__init__(*given)
        self._clock = clock
        #: per position of a segment, the scored rows that it gave
        self.offered: dict[int, int] = {}

    def parts(self) -> Iterator[Part]:
        for part in super().parts():
            segments, rows = np.unique(part.segments[part.rows >= 0], return_counts=True)
            self.offered.update(zip(segments.tolist(), rows.tolist(), strict=True))
            yield part

    def _vectors(self, model: str) -> Vectors:
        with self._clock("transform"):
            return super()._vectors(model)

    def _ask(self, at: int, model: str, k: int, *, roughly: bool = False) -> Part:
        with self._clock("ask", at):
            return super()._ask(at, model, k, roughly=roughly)

    def _ask_mapped(self, at: int, column: str, by: By) -> Iterator[Part]:
        with self._clock("ask", at):
            yield from list(super()._ask_mapped(at, column, by))

    def _mapped(self, view: SegmentView, column: str, by: By) -> Index:
        with self._clock("transform"):
            return super()._mapped(view, column, by)

    def _map(self, places: Rows, column: str, by: By) -> Vectors:
        with self._clock("transform"):
            return super()._map(places, column, by)

    def _score(self, mapped: Vectors, inverse: Any) -> Vectors:
        with self._clock("score"):
            return super()._score(mapped, inverse)


def _scores(answer: Answer) -> dict[Place, float]:
    """The first query's hits: the score by place, best first."""
    places = zip(answer.segments[0].tolist(), answer.rows[0].tolist(), answer.scores[0].tolist(), strict=True)
    return {(segment, row): score for segment, row, score in places if row >= 0}
