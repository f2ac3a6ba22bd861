"""Whether an upgrade is worth it, judged on items that no map was trained on: upgrade, stay, or score with both.

Every way to search is judged on the same queries, so that two ways can be compared query by query and chance can be told from
gain. Queries are some of the items, and each is left out of its own ranking.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from models.evaluation import (
    Array,
    Metric,
    fraction_closed,
    ranked,
    ranks_and_precisions,
    score_blocks,
    shared_by_depth,
)
from models.fusion import WEIGHTS, Scores, Vectors, fused_blocks
from models.inputs import Pairs
from models.runtime import Transform

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
Decision = Literal["upgrade", "stay", "fuse"]
Floats = npt.NDArray[np.float64]

#: the ways to search, `fuse` where both spaces are worth scoring with
SEARCHES: tuple[str, ...] = ("stay", "naive", "upgrade", "fuse", "ceiling")
NEIGHBOURS = 10
RESAMPLES = 2_000
#: the least depth that can be measured is 1, and recall is extrapolated down to 1 / FURTHEST; below, its line bends (ADR 0055)
FURTHEST = 10
MIN_QUERIES = 20  # fewer may all agree by chance, and then a bootstrap shows no uncertainty at all


class Metrics(NamedTuple):
    """The metric of each model's space. A search is judged by what it finds with the metric of the space that it searches."""

    old: Metric
    new: Metric

    def mapped(self, direction: Direction) -> Metric:
        """The metric of the space that a map leads to: the new one for a gallery, the old one for queries."""
        return self.new if direction == "forward" else self.old


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Items to judge by, in random order; the first `queries` of them are also the queries."""

    pairs: Pairs
    queries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """How much better one way to search is than another, per query on average, with its 95 % interval."""

    difference: float
    low: float
    high: float


Measured = dict[str, float]
Compared = dict[str, Interval]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What to do, and the numbers that say so."""

    decision: Decision
    #: one sentence, with the numbers, and among how many items they hold
    reason: str
    #: whether upgrading alone gains on staying; it decides for those who cannot score with both
    upgrade_gains: bool
    #: what the numbers assume; None where labels say what is right
    assumption: str | None
    #: `stay`, `naive`, `upgrade`, `fuse` (where a weight between 0 and 1 was chosen) and `ceiling`, each with its measures
    searches: dict[str, Measured]
    #: `upgrade - stay`, `naive - stay` and, with fusing, `fuse - stay` and `fuse - upgrade`
    differences: dict[str, Compared]
    #: the weight of the upgraded score in fused scoring, chosen on the validation part; 1 is upgrading, 0 is staying
    weight: float
    #: by measure, which part of the gap from staying to the ceiling upgrading closes; None where there is no gap
    closed: dict[str, float | None]
    #: how many queries have something to find, and how many items they search
    queries: int
    gallery: int


class Judge(ABC):
    """Knows what is right for each query of a sample, and measures how much of it a search finds."""

    measures: ClassVar[tuple[str, ...]]
    #: what the measures assume
    assumption: ClassVar[str | None] = None
    #: the reason that is given where there may be no difference
    undecided: str = "no measurable gain"

    def __init__(self, items: int) -> None:
        #: among which items the measures hold, in words
        self.scope = f"among {items:,} items"
        #: why nothing can be said, whatever is measured; None if something can
        self.silent: str | None = None
        #: (items,) whom a query finds and is found by; None where that is not known
        self.labels: Array | None = None

    @abstractmethod
    def __call__(self, start: int, scores: Scores) -> Floats:
        """Judge a block of queries, the first of which is query `start`: (block, n), which `settled` turns into measures."""

    def settled(self, seen: Floats) -> Floats:
        """Turn what was seen of all queries into their measures (queries, measures), NaN for queries with nothing to find."""
        return seen

    def search(self, vectors: Vectors, metric: Metric) -> Floats:
        """Judge a search of `vectors`, (queries, gallery): (queries, measures)."""
        return self._each(score_blocks(*vectors, metric=metric, leave_one_out=True))

    def fused(self, upgraded: Vectors, old: Vectors, weights: tuple[float, ...]) -> dict[float, Floats]:
        """Judge fused scoring by each weight."""
        judged: dict[float, list[Floats]] = {weight: [] for weight in weights}
        for start, scores in fused_blocks(upgraded, old, weights):
            for weight in weights:
                judged[weight].append(self(start, scores[weight]))
        return {weight: self.settled(np.concatenate(parts)) for weight, parts in judged.items()}

    def means(self, judged: Floats) -> Measured:
        """Return the mean of each measure over the queries that have something to find, from 0 to 1.

        The mean of what queries contribute to an extrapolated recall of nothing (`carried`) may be rounded to below it.
        """
        counted = _counted(judged)
        means = np.clip(counted.mean(axis=0), 0, 1) if len(counted) else np.zeros(len(self.measures))
        return dict(zip(self.measures, map(float, means), strict=True))

    def _each(self, blocks: Iterable[tuple[int, Scores]]) -> Floats:
        return self.settled(np.concatenate([self(start, scores) for start, scores in blocks]))


class ByLabel(Judge):
    """Items with the query's label are right."""

    measures = ("cmc1", "map")

    def __init__(self, labels: Array) -> None:
        super().__init__(len(labels))
        self.labels = codes = np.unique(labels, return_inverse=True)[1]
        self._codes = codes

    def __call__(self, start: int, scores: Scores) -> Floats:
        found = ranks_and_precisions(scores, self._codes[start : start + len(scores)], self._codes)
        found[:, 0] = np.where(np.isnan(found[:, 0]), np.nan, found[:, 0] < 1)
        return found


class ByNeighbours(Judge):
    """The exact nearest neighbours of the new model itself are right, in a gallery that may have more items than the sample.

    The ten nearest items of a large gallery are nearer than any of the sample. So recall@10 in the gallery is more like recall@1
    in the sample than like recall@10 in the sample. Recall is measured in the sample at each depth from 1 to 10, and a line is
    fitted to its log-odds over the log of the depth. The line is read at the depth that the gallery's ten nearest have in the
    sample, which is ten times the sample's share of the gallery.
    """

    measures = ("recall",)
    assumption = (
        "there are no usable labels, so what the new model itself finds counts as right: this assumes that it is better"
    )

    def __init__(self, sample: Sample, metric: Metric, *, gallery: int = 0) -> None:
        new = sample.pairs.target
        items = len(new)
        super().__init__(items)
        k = min(NEIGHBOURS, items - 1)
        blocks = score_blocks(new[: sample.queries], new, metric=metric, leave_one_out=True)
        self._wanted = np.concatenate([ranked(scores, k) for _, scores in blocks])
        self._depth = k * (items - 1) / max(gallery - 1, items - 1)
        if self._depth * FURTHEST < 1:
            needed = 1 + ceil((gallery - 1) / (k * FURTHEST))
            self.silent = (
                f"{items:,} items without labels cannot tell what is found in a gallery of {gallery:,}: {needed:,} that are "
                "held out could, or labels"
            )
        elif gallery > items:
            self.scope = f"in a gallery of {gallery:,}, as far as {items:,} items show it"
            self.undecided = "these pairs cannot tell whether upgrading gains, more pairs or labels could"

    def __call__(self, start: int, scores: Scores) -> Floats:
        wanted = self._wanted[start : start + len(scores)]
        return shared_by_depth(scores, wanted) / np.arange(1, wanted.shape[1] + 1)

    def settled(self, seen: Floats) -> Floats:
        return carried(seen, self._depth)[:, None]


def carried(seen: Floats, depth: float) -> Floats:
    """Extrapolate recall to a depth that cannot be measured, by a line through its log-odds over the log of the depth.

    Args:
        seen: (queries, k), recall at the depths 1 to k.
        depth: above 0, up to k.

    Returns:
        (queries,), whose mean is the extrapolated recall. Each value is what the query contributes to it (the delta
        method), so that two searches can be compared query by query; a single value may be below 0 or above 1.
    """
    queries, k = seen.shape
    if depth >= k or k < 2:
        return seen[:, -1]
    margin = 1 / (2 * queries * k)  # log-odds of 0 and 1 are infinite: half a find is added to both sides
    means = seen.mean(axis=0)
    inside = margin + (1 - 2 * margin) * means
    away = np.log(np.arange(1, k + 1) / depth)
    slopes = (away - away.mean()) / np.square(away - away.mean()).sum()
    weights = 1 / k - away.mean() * slopes  # of least squares, where `away` is 0
    odds = np.exp(weights @ np.log(inside / (1 - inside)))
    level = odds / (1 + odds)
    told = np.clip((level - margin) / (1 - 2 * margin), 0, 1)
    return np.asarray(told + level * (1 - level) * ((seen - means) / (inside * (1 - inside))) @ weights, np.float64)


def judge_of(sample: Sample, *, metric: Metric, gallery: int = 0) -> Judge:
    """The judge of a sample: by its labels, or, where it has none, by the new model's neighbours.

    Args:
        sample: which.
        metric: of the new model.
        gallery: how many items the gallery has, if it has more than the sample.
    """
    labels = sample.pairs.labels
    return ByNeighbours(sample, metric, gallery=gallery) if labels is None else ByLabel(labels)


def searches(sample: Sample, transform: Transform, *, direction: Direction) -> dict[str, Vectors]:
    """Return the ways to search a sample, each as (queries, gallery).

    `stay` is old queries on old vectors; `naive` is new queries on old vectors without a map, cut off or padded with zeros to
    the same width; `upgrade` goes through the map; `ceiling` is new on new, as if everything had been embedded again.
    """
    pairs, count = sample.pairs, sample.queries
    old, new = pairs.source, pairs.target
    if direction == "forward":
        naive, upgraded = (new, _resized(old, new.shape[1])), (new, transform(old, pairs.side))
    else:
        naive, upgraded = (_resized(new, old.shape[1]), old), (transform(new), old)
    every = {"stay": (old, old), "naive": naive, "upgrade": upgraded, "ceiling": (new, new)}
    return {name: (queries[:count], gallery) for name, (queries, gallery) in every.items()}


def worth(sample: Sample, transform: Transform, judge: Judge, *, direction: Direction, metric: Metric) -> Measured:
    """Measure an upgrade by itself, without fusing; maps are chosen by this."""
    return judge.means(judge.search(searches(sample, transform, direction=direction)["upgrade"], metric))


def overall(measured: Measured) -> float:
    """The one number that choices are made by: the mean of the measures, so that none is given up for another."""
    return float(np.mean(list(measured.values())))


def choose_weight(sample: Sample, transform: Transform, judge: Judge, *, direction: Direction) -> float:
    """Choose the weight of fused scoring; of equally good ones 0 or 1, which need no second score."""
    ways = searches(sample, transform, direction=direction)
    judged = judge.fused(ways["upgrade"], ways["stay"], WEIGHTS)
    return max(WEIGHTS, key=lambda weight: (overall(judge.means(judged[weight])), abs(weight - 0.5)))


def give_verdict(
    sample: Sample,
    transform: Transform,
    judge: Judge,
    *,
    direction: Direction,
    metrics: Metrics,
    weight: float,
    seed: int = 0,
) -> Verdict:
    """Compare all ways to search on items that nothing was trained on or chosen by.

    Args:
        sample: the test part.
        transform: the map.
        judge: of this sample.
        direction: of the map.
        metrics: of both models; fused scoring always uses cosine.
        weight: of fused scoring, chosen on other items.
        seed: of the bootstrap.
    """
    ways = searches(sample, transform, direction=direction)
    mapped = metrics.mapped(direction)
    by: dict[str, Metric] = {"stay": metrics.old, "naive": mapped, "upgrade": mapped, "ceiling": metrics.new}
    judged: dict[str, Floats] = {name: judge.search(vectors, by[name]) for name, vectors in ways.items()}
    rivals = {"stay": judged["stay"]}
    if 0 < weight < 1:
        fused = judge.fused(ways["upgrade"], ways["stay"], (0.0, weight))
        judged["fuse"] = fused[weight]
        if metrics.old != "cosine":  # else fusing would get credit for what cosine alone gains
            rivals["stay by cosine"] = fused[0.0]

    def compared(first: str, second: Floats) -> Compared:
        found = bootstrap(judged[first], second, labels=judge.labels, seed=seed)
        return dict(zip(judge.measures, found, strict=True))

    differences = {f"{name} - stay": compared(name, judged["stay"]) for name in ("upgrade", "naive")}
    if "fuse" in judged:
        differences |= {f"fuse - {name}": compared("fuse", rival) for name, rival in rivals.items()}
        differences["fuse - upgrade"] = compared("fuse", judged["upgrade"])
    means = {name: judge.means(judged[name]) for name in SEARCHES if name in judged}
    queries = len(_counted(judged["stay"]))
    decision, why = _decide(differences, queries, judge)
    if _unknown(queries, judge) is None and gains(differences["naive - stay"]):
        why += f"; new queries gain on the old vectors as they are: {describe(differences['naive - stay'])}"
    return Verdict(
        decision=decision,
        reason=f"{why}; {judge.scope}",
        upgrade_gains=_unknown(queries, judge) is None and gains(differences["upgrade - stay"]),
        assumption=judge.assumption,
        searches=means,
        differences=differences,
        weight=weight,
        closed={name: _closed(means, name) for name in judge.measures},
        queries=queries,
        gallery=len(sample.pairs),
    )


def bootstrap(
    first: Floats, second: Floats, *, labels: Array | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> list[Interval]:
    """Compare two searches over the same queries by a paired bootstrap: percentiles of the resampled mean difference.

    Items of one label find each other, so what a query of them finds is not independent of what another finds. Where each
    label has two items, the interval from resampled queries is a quarter too narrow. So labels are resampled with all their
    queries, too, and the wider interval counts. Of few labels that would say little: then only queries are resampled.
    Other items of the gallery never are.

    Args:
        first: (queries, measures), NaN in the rows of queries that have nothing to find.
        second: likewise, the same queries.
        labels: (queries or more,) of the queries, in the same order; None where there are none.
        seed: of the resampling.
        resamples: how many.

    Returns:
        The interval of first - second for each measure.
    """
    counted = ~np.isnan(first - second).any(axis=1)
    differences = (first - second)[counted]
    if not len(differences):
        return [Interval(difference=0.0, low=0.0, high=0.0)] * first.shape[1]
    ends = [_ends(differences, np.arange(len(differences)), seed, resamples)]
    if labels is not None:
        present, codes = np.unique(labels[: len(first)][counted], return_inverse=True)
        if len(present) >= MIN_QUERIES:
            ends.append(_ends(differences, codes, seed, resamples))
    low, high = np.min(ends, axis=0)[0], np.max(ends, axis=0)[1]
    return [
        Interval(difference=float(mean), low=float(least), high=float(most))
        for mean, least, most in zip(differences.mean(axis=0), low, high, strict=True)
    ]


def _ends(differences: Floats, units: Array, seed: int, resamples: int) -> Floats:
    """Return the ends of the 95 % interval (2, measures) of the mean, from resampled units; (queries,) says whose a query is."""
    sizes = np.bincount(units)
    drawn = np.random.default_rng(seed).integers(0, len(sizes), (resamples, len(sizes)))
    counts = sizes[drawn].sum(axis=1)
    means = [np.bincount(units, column)[drawn].sum(axis=1) / counts for column in differences.T]
    return np.asarray(np.percentile(means, [2.5, 97.5], axis=1), np.float64)


def gains(compared: Compared) -> bool:
    """Say whether a way to search is measurably better: by some measure, and worse by none."""
    return any(each.low > 0 for each in compared.values()) and not loses(compared)


def loses(compared: Compared) -> bool:
    """Say whether a way to search is measurably worse by some measure."""
    return any(each.high < 0 for each in compared.values())


NAMES = {"cmc1": "CMC-1", "map": "mAP", "recall": f"recall@{NEIGHBOURS}"}


def describe(compared: Compared) -> str:
    """Write differences in percentage points, each with its 95 % interval."""
    return ", ".join(
        f"{NAMES[name]} {100 * each.difference:+.1f} ({100 * each.low:+.1f} to {100 * each.high:+.1f})"
        for name, each in compared.items()
    )


def _unknown(queries: int, judge: Judge) -> str | None:
    """Why nothing can be said; None if something can."""
    if queries < MIN_QUERIES:
        return f"{queries} queries have something to find, too few to measure a gain: stay"
    return judge.silent


def _decide(differences: dict[str, Compared], queries: int, judge: Judge) -> tuple[Decision, str]:
    upgrade = differences["upgrade - stay"]
    unknown = _unknown(queries, judge)
    if unknown is not None:
        return "stay", unknown
    against_old = [each for name, each in differences.items() if name.startswith("fuse - stay")]
    fusing = bool(against_old) and all(map(gains, against_old))
    if gains(upgrade):
        more = differences.get("fuse - upgrade")
        if fusing and more is not None and gains(more):
            return (
                "fuse",
                f"fused scoring gains on upgrading: {describe(more)}; upgrading on staying: {describe(upgrade)}",
            )
        return "upgrade", f"upgrading gains on staying: {describe(upgrade)}"
    if fusing:
        return (
            "fuse",
            f"fused scoring gains on staying: {describe(against_old[0])}; upgrading alone: {describe(upgrade)}",
        )
    if loses(upgrade):
        return "stay", f"upgrading loses to staying: {describe(upgrade)}"
    return "stay", f"{judge.undecided}: {describe(upgrade)}"


def _closed(means: dict[str, Measured], measure: str) -> float | None:
    before, after, best = (means[name][measure] for name in ("stay", "upgrade", "ceiling"))
    return fraction_closed(before, after, best) if best > before else None


def _counted(judged: Floats) -> Floats:
    return judged[~np.isnan(judged).any(axis=1)]


def _resized(vectors: Array, width: int) -> Array:
    kept = min(vectors.shape[1], width)
    return np.pad(vectors[:, :kept], ((0, 0), (0, width - kept)))
