"""Ask a gallery's probes and judge what they find.

Probes are queries with known vectors, in the source and in the target model, and, where known, the ids that are relevant.
They are asked by the same search that serves, in one snapshot: what queries of the source model find there is `before`. So items
that come and go meanwhile change both sides of a comparison. Before the first segment, that search cannot show what will be found
after the upgrade. What is expected is therefore measured by a search that maps and scores every item.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy.orm import Session

from gallery import errors
from gallery.arrays import Vectors
from gallery.catalog import probes as probe_rows
from gallery.catalog.tables import ProbeRow, UpgradeRow
from gallery.search.request import Answer, SearchRequest
from gallery.search.run import Searcher
from gallery.snapshot import World
from gallery.upgrade import gate
from gallery.upgrade.measures import K, measures
from gallery.upgrade.thresholds import Scored, carried_over, unknown

_NO_PROBES = "there are no probes with vectors of both models, which could tell"


#: a search of one gallery in what a process sees
Ask = Callable[[Searcher, World, str, SearchRequest], Answer]


class Found(NamedTuple):
    """What probes of one model found."""

    probes: Sequence[ProbeRow]
    #: per probe, ids of its hits, best first
    ids: list[list[str]]
    #: per probe, their scores
    scores: list[list[float]]

    @property
    def relevant(self) -> list[Sequence[str]]:
        """Per probe, what it should find; empty where nobody knows."""
        return [probe.relevant or () for probe in self.probes]


class Measured(NamedTuple):
    """The measures of the source model's and of the target model's answers; None where there are no answers."""

    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    #: both are of the same probes
    paired: bool = False

    def shortfalls(self, limits: Mapping[str, float], what: str) -> list[gate.Shortfall]:
        """The limits of a gate that are missed (`gallery.upgrade.gate`); only the same probes can tell a drop."""
        return gate.shortfalls(limits, self.before if self.paired else None, self.after, what)


class Comparison(NamedTuple):
    """The same probes asked in both models; None where a model's could not be asked."""

    before: Found | None
    after: Found | None
    #: both are the answers of the same probes
    paired: bool

    def measured(self) -> Measured:
        """How good both are."""
        before, after = self.before, self.after
        earlier = before.ids if before is not None and self.paired else None
        return Measured(
            None if before is None else measures(before.ids, before.relevant),
            None if after is None else measures(after.ids, after.relevant, earlier),
            self.paired,
        )


def stored(session: Session, row: UpgradeRow) -> list[ProbeRow]:
    """The probes of an upgrade's gallery."""
    return probe_rows.of_gallery(session, row.gallery_id or 0)


def compare(
    searcher: Searcher,
    row: UpgradeRow,
    probes: Sequence[ProbeRow],
    *,
    before: World,
    after: World,
    ask: Ask = Searcher.search,
) -> Comparison:
    """Ask the probes with vectors of both models; where none has both, each model is asked by those that it has.

    Args:
        searcher: of this process.
        row: the upgrade.
        probes: of its gallery.
        before: what source-model queries are asked of: the gallery as searches see it now.
        after: what target-model queries are asked of: the same, or one of `foresight`'s.
        ask: how target-model queries are asked. Before the gallery is upgraded, that is `search_exactly`: in a search that
            serves, the source model proposes candidates, and both models together often find more than the upgraded gallery will.
    """
    source, target = row.source.name, row.target.name
    both = _having(probes, source, target)
    return Comparison(
        # A query of the source model comes without its vector in the target, as it did before; where items came natively in
        # the target model, it is answered from the others.
        _find(before, searcher, row, source, both or _having(probes, source), without={target}, partial=True),
        _find(after, searcher, row, target, both or _having(probes, target), partial=bool(both), ask=ask),
        paired=bool(both),
    )


def thresholds(world: World, row: UpgradeRow, asked: Sequence[float], compared: Comparison) -> list[dict[str, Any]]:
    """What becomes of thresholds on the scores of source-model queries (`gallery.upgrade.thresholds`)."""
    before, after = compared.before, compared.after
    if before is None or after is None or not compared.paired:
        return [unknown(threshold, _NO_PROBES) for threshold in asked]
    was, will = (_scored(world, name, of) for name, of in ((row.source.name, before), (row.target.name, after)))
    return [{**carried_over(threshold, was, will), "probes": len(before.probes)} for threshold in asked]


def pairs(probes: Sequence[ProbeRow], source: str, target: str) -> tuple[Vectors, Vectors] | None:
    """The vectors of the probes that have both; None if none has."""
    both = _having(probes, source, target)
    return (probe_rows.vectors(both, source), probe_rows.vectors(both, target)) if both else None


def _find(
    world: World,
    searcher: Searcher,
    row: UpgradeRow,
    model: str,
    probes: Sequence[ProbeRow],
    *,
    partial: bool,
    without: Collection[str] = (),
    ask: Ask = Searcher.search,
) -> Found | None:
    """What queries of a model find, with their vectors in other models; None if there are none, or no route serves them."""
    if not probes:
        return None
    companions = set.intersection(*(set(probe.vectors) for probe in probes)) - {model, *without}
    request = SearchRequest(
        model=model,
        vectors=probe_rows.vectors(probes, model),
        companions={other: probe_rows.vectors(probes, other) for other in sorted(companions)},
        k=K,
        allow_partial=partial,
    )
    try:
        answer = ask(searcher, world, row.gallery_name, request)
    except (errors.NoRoute, errors.ModelRetired):
        return None
    hits = [answer.hits(at) for at in range(len(probes))]
    return Found(probes, [[hit.id for hit in each] for each in hits], [[hit.score for hit in each] for each in hits])


def _having(probes: Sequence[ProbeRow], *models: str) -> list[ProbeRow]:
    return [probe for probe in probes if all(model in probe.vectors for model in models)]


def _scored(world: World, model: str, found: Found) -> Scored:
    hits = list(_hits(found))
    return Scored(
        metric=world.model(model).metric,
        scores=np.array([score for score, _, _ in hits], np.float64),
        relevant=np.array([right for _, right, _ in hits], np.bool_),
        known=np.array([known for _, _, known in hits], np.bool_),
        wanted=sum(min(K, len(set(relevant))) for relevant in found.relevant),
    )


def _hits(found: Found) -> Iterator[tuple[float, bool, bool]]:
    """Every hit: its score, whether it is relevant, and whether that is known."""
    for ids, scores, relevant in zip(found.ids, found.scores, found.relevant, strict=True):
        for item, score in zip(ids, scores, strict=True):
            yield score, item in relevant, bool(relevant)
