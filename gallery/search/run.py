"""Do a search: plan, ask each shelf once by its route, merge. No database, unless the payload is filtered.

The scores of every route come from `gallery.index.scores`: `direct` shelves are asked for the score space itself, and
candidates of the other routes are mapped into it first. So all scores of one answer compare.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gallery import errors
from gallery.arrays import Mask, Origin, Rows, Vectors
from gallery.index.base import Index
from gallery.index.quantizer import Assignments
from gallery.index.scores import score, unit, worst
from gallery.index.selection import Selected
from gallery.search.brief import NotBrief, reads
from gallery.search.filtering import Filters
from gallery.search.mapped import Asked, By, MappedColumns
from gallery.search.merge import Part, merge, single
from gallery.search.request import Answer, SearchRequest
from gallery.search.routes import Known, Plan, Route, SegmentFacts, plan
from gallery.snapshot import Snapshot, World
from gallery.store import Store
from gallery.transforms import Transforms
from gallery.vectors import as_query, scoreable
from gallery.views import SegmentView

_ROW_BITS = 32  # a segment has fewer rows than this holds
_SCORED_AT_ONCE = 1 << 24  # numbers; 64 MiB of float32 while candidates are scored
_MOST_PLANS = 1024  # of one world


class ReadyPlan(NamedTuple):
    """A plan, and what follows from it for every search that uses it. Shelves are positions in `snapshot.shelves`."""

    #: with a way for each shelf of the snapshot
    plan: Plan
    #: for each segment of the snapshot, where the vectors that are scored come from
    origins: Sequence[Origin]
    #: shelves that are searched in the score space itself
    direct: Sequence[int]
    #: shelves of which every row is a candidate, each with the model of its column and the transformations to apply
    exhaustive: Sequence[tuple[int, str, By]]
    #: shelves that are searched together for candidates, by the model of their column and the transformations to apply
    rescored: Mapping[tuple[str, By], Sequence[int]]
    #: spaces in which only one shelf is searched, so that the lists found for it need not be kept for others
    alone: Collection[str]
    #: how many numbers one query reads, see `gallery.search.brief`
    reads: int | None


def ready_plan(snapshot: Snapshot, planned: Plan) -> ReadyPlan:
    """Sort the shelves of a plan by how they are searched."""
    direct, exhaustive = list[int](), list[tuple[int, str, By]]()
    rescored: dict[tuple[str, By], list[int]] = {}
    for at, way in enumerate(planned.ways):
        if way is None:
            continue
        if not way.by:
            direct.append(at)
        elif way.exhaustive:
            exhaustive.append((at, way.column, way.by))
        else:
            rescored.setdefault((way.column, way.by), []).append(at)
    asked = Counter({planned.score_space: len(direct)})
    for (column, _), shelves in rescored.items():
        asked[column] += len(shelves)
    alone = frozenset(name for name, shelves in asked.items() if shelves == 1)
    return ReadyPlan(
        planned, _origins(snapshot, planned), direct, exhaustive, rescored, alone, reads(snapshot, planned)
    )


@dataclass(frozen=True, slots=True)
class Searcher:
    """What searches need beside the snapshot; one per process, safe from many threads."""

    filters: Filters
    transforms: Transforms
    mapped: MappedColumns
    #: candidates per hit on forward and backward routes
    oversample: int
    min_candidates: int

    @classmethod
    def of(cls, store: Store) -> Searcher:
        """With the numbers and bounds of a store's settings."""
        settings = store.settings
        return cls(
            Filters(store.catalog, settings.filter_cache_bytes),
            store.transforms,
            MappedColumns(store.transforms, settings.mapped_cache_bytes),
            settings.oversample,
            settings.min_candidates,
        )

    def search(self, world: World, gallery: str, request: SearchRequest, *, at_most: float = math.inf) -> Answer:
        """Search one gallery at the version of `world`.

        Args:
            world: what the process sees.
            gallery: its name.
            request: what is asked.
            at_most: how many weights may be applied to transform candidates.

        Raises:
            GalleryNotFound, ModelNotFound: as they say.
            NoRoute, ModelRetired: no score space reaches every segment.
            InvalidFilter: the filter cannot be compiled.
            NotBrief: more would have to be transformed; its `rest` does that.
        """
        run = self.begin(world, gallery, request)
        run.at_most = at_most
        try:
            return run.answer()
        except NotBrief as halted:
            halted.rest = run.rest
            raise

    def begin(self, world: World, gallery: str, request: SearchRequest) -> Run:
        """Plan a search and evaluate its filter; no index is asked yet. Raises as `search`."""
        snapshot = world.snapshot(gallery)
        ready = ready_plan_for(world, snapshot, request)
        return Run(self, world, snapshot, request, ready, self.filtered(snapshot, request))

    def filtered(self, snapshot: Snapshot, request: SearchRequest) -> Sequence[Mask] | None:
        """Per shelf, the rows that fit the payload filter; None where there is no filter."""
        return None if request.filter is None else self.filters.masks(snapshot, request.filter)


def ready_plan_for(world: World, snapshot: Snapshot, request: SearchRequest) -> ReadyPlan:
    """How a request will be done; raises as `Searcher.search`."""
    key = (snapshot.gallery_id, request.model, frozenset(request.companions), request.allow_partial)
    found: ReadyPlan | None = world.memo.get(key)
    if found is None:
        found = _new_plan_for(world, snapshot, request)
        if len(world.memo) < _MOST_PLANS:
            world.memo[key] = found
    return found


def _new_plan_for(world: World, snapshot: Snapshot, request: SearchRequest) -> ReadyPlan:
    world.model(request.model)
    for name in request.companions:
        world.model(name)
    known = Known(request.model, request.companions.keys(), world.registry, snapshot.pinned, snapshot.zeros_for)
    segments = [
        SegmentFacts(
            frozenset((name, len(column.lineage)) for name, column in shelf.segments[0].columns.items()),
            shelf.segments[0].side_dimension,
            shelf.live,
        )
        for shelf in snapshot.shelves
        if shelf.live
    ]
    try:
        planned = plan(known, segments, allow_partial=request.allow_partial)
        if not segments and request.model in snapshot.retired:  # refused as it would be once there is an item again
            plan(known, [SegmentFacts(frozenset({(snapshot.model, 0)}), None, 1)], allow_partial=request.allow_partial)
    except errors.NoRoute as error:
        if request.model in snapshot.retired:
            raise errors.ModelRetired(
                f"{snapshot.gallery} was upgraded from {request.model} to {snapshot.model} for good: embed the query with "
                f"{snapshot.model}, or register a backward transformation from {snapshot.model} to {request.model}"
            ) from error
        raise
    ways = iter(planned.ways)
    aligned = tuple(next(ways) if shelf.live else None for shelf in snapshot.shelves)
    return ready_plan(snapshot, replace(planned, ways=aligned))


def _origins(snapshot: Snapshot, planned: Plan) -> list[Origin]:
    """Whether the vectors that are scored are the model's own or come out of a transformation."""
    origins: list[Origin] = ["derived"] * len(snapshot.segments)
    for shelf, way in zip(snapshot.shelves, planned.ways, strict=True):
        if way is not None and way.route is Route.DIRECT:
            for at, _, view in shelf.each():
                origins[at] = view.columns[planned.score_space].origin
    return origins


class Run:
    """One search under way. `explain` watches its steps, so each is a method of its own."""

    def __init__(
        self,
        searcher: Searcher,
        world: World,
        snapshot: Snapshot,
        request: SearchRequest,
        ready: ReadyPlan,
        filtered: Sequence[Mask] | None,
    ) -> None:
        self.searcher = searcher
        self.world = world
        self.models = world.registry.models
        self.snapshot = snapshot
        self.request = request
        self.ready = ready
        self.plan = ready.plan
        self.filtered = filtered
        self.target = self.models[self.plan.score_space]
        #: so many weights may be applied to transform candidates
        self.at_most = math.inf
        self.candidates = max((request.oversample or searcher.oversample) * request.k, searcher.min_candidates)
        self._queries: dict[str, Vectors] = {}
        self._assigned: dict[str, Assignments] = {}
        #: by shelf and model
        self._asked: dict[tuple[int, str], Part] = {}

    def rest(self) -> Answer:
        """Finish a search that `NotBrief` stopped, without a limit; no index is asked again."""
        self.at_most = math.inf
        return self.answer()

    def answer(self) -> Answer:
        """Ask each shelf, and merge what they found."""
        parts = list(self.parts())
        if len(parts) == 1 and self.ready.direct:
            best = parts[0]  # of one shelf, as it was asked for
        else:
            best = merge(parts, self.request.k, self.target.metric, len(self.request.vectors))
        return Answer(
            snapshot=self.snapshot,
            score_space=self.plan.score_space,
            coverage=self.plan.coverage,
            scores=best.scores,
            segments=best.segments,
            rows=best.rows,
            origins=self.ready.origins,
        )

    def parts(self) -> Iterator[Part]:
        """What each group of shelves found, scored in the score space."""
        for at in self.ready.direct:
            yield self._ask(at, self.target.name, self.request.k)
        for at, column, by in self.ready.exhaustive:
            yield from self._ask_mapped(at, column, by)
        for (column, by), shelves in self.ready.rescored.items():
            yield self._rescore(column, by, shelves)

    def _query(self, model: str) -> Vectors:
        """The queries in a model's space: as sent, or mapped by a backward transformation."""
        found = self._queries.get(model)
        if found is None:
            found = as_query(self._vectors(model), self.models[model])
            self._queries[model] = found
        return found

    def _vectors(self, model: str) -> Vectors:
        if model == self.request.model:
            return self.request.vectors
        if model in self.request.companions:
            return self.request.companions[model]
        transformation = self.plan.query_by[model]
        if len(self.request.vectors) * self.searcher.transforms.weights([transformation], stored=False) > self.at_most:
            raise NotBrief(transformation.name)
        mapped = self.searcher.transforms.apply(transformation, self.models[model], self.request.vectors, None)
        if not np.isfinite(mapped).all():
            raise errors.InvalidVector(
                f"{transformation.name} maps the query beyond float32: ask with a vector of {model}"
            )
        return scoreable(mapped)

    def _selected(self, at: int) -> Selected | None:
        """Rows of a shelf that are live and fit the filter."""
        live = self.snapshot.shelves[at].selected
        if self.filtered is None:
            return live
        fitting = self.filtered[at]
        return Selected(fitting if live is None else fitting & live.mask)

    def _ask(self, at: int, model: str, k: int, *, roughly: bool = False) -> Part:
        """The best rows of one shelf in a space that it has columns of; `roughly` where they will be scored again."""
        part = self._asked.get((at, model))
        if part is None:
            part = self._asked[at, model] = self._ask_index(at, model, k, roughly=roughly)
        return part

    def _ask_index(self, at: int, model: str, k: int, *, roughly: bool) -> Part:
        shelf = self.snapshot.shelves[at]
        assigned = self._assigned.get(model)
        if assigned is None:  # shelves share what one finds out
            alone = model in self.ready.alone
            assigned = self._assigned[model] = Assignments(self._query(model), roughly=roughly, alone=alone)
        found = shelf.indexes[model].search(assigned.queries, min(k, shelf.rows), self._selected(at), assigned)
        return Part(found.scores, *shelf.places(found.rows))

    def _ask_mapped(self, at: int, column: str, by: By) -> Iterator[Part]:
        """The best rows of each segment of a shelf, all of which are mapped: the query has no vector in the column's space."""
        shelf, selected = self.snapshot.shelves[at], self._selected(at)
        for position, start, view in shelf.each():
            own = None if selected is None else Selected(selected.mask[start : start + view.rows])
            index = self._mapped(view, column, by)
            found = index.search(self._query(self.target.name), min(self.request.k, view.rows), own)
            yield single(position, found.scores, found.rows)

    def _mapped(self, view: SegmentView, column: str, by: By) -> Index:
        """A whole column in the score space."""
        return self.searcher.mapped.index(view.columns[column], view.side, by, self.models)

    def _rescore(self, column: str, by: By, shelves: Iterable[int]) -> Part:
        """The best candidates over several shelves in the column's space, mapped once and scored again."""
        parts = [self._ask(at, column, self.candidates, roughly=True) for at in shelves]
        best = parts[0]
        if len(parts) > 1:
            best = merge(parts, self.candidates, self.models[column].metric, len(self.request.vectors))
        places = (best.segments << _ROW_BITS) | best.rows  # -1 stays -1
        if len(places) == 1:  # each candidate once, so they need only be in order
            order = places[0].argsort()
            best = Part(best.scores[:, order], best.segments[:, order], best.rows[:, order])
            distinct, inverse = places[0][order], np.arange(len(order))[None]
        else:
            distinct, inverse = np.unique(places, return_inverse=True)
            inverse = inverse.reshape(places.shape)
        scores = self._score(self._map(distinct, column, by), inverse)
        scores[best.rows < 0] = worst(self.target.metric)
        return Part(scores, best.segments, best.rows)

    def _map(self, places: Rows, column: str, by: By) -> Vectors:
        """The candidates at sorted places, of segment and row in one number, in the score space; -1 stands for none."""
        found = places[places >= 0]
        segments, starts = np.unique(found >> _ROW_BITS, return_index=True)
        parts = np.split(found & ((1 << _ROW_BITS) - 1), starts)[1:]  # what is before the first start is nothing
        asked = [
            Asked(self.snapshot.segments[at].columns[column], self.snapshot.segments[at].side, rows)
            for at, rows in zip(segments.tolist(), parts, strict=True)
        ]
        mapped = np.zeros((len(places), self.target.dimension), dtype=np.float32)
        mapped[len(places) - len(found) :] = self.searcher.mapped.take(asked, by, self.models, at_most=self.at_most)
        return unit(mapped) if self.target.metric == "cosine" else mapped

    def _score(self, mapped: Vectors, inverse: NDArray[np.intp]) -> Vectors:
        """Score (queries, candidates) given as positions in `mapped`, a bounded number at once."""
        queries = self._query(self.target.name)
        scores = np.empty(inverse.shape, dtype=np.float32)
        step = max(1, _SCORED_AT_ONCE // max(1, inverse.shape[1] * self.target.dimension))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            scores[part] = score(queries[part], mapped[inverse[part]], self.target.metric)
        return scores
