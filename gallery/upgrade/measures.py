"""How good answers are: from the ids that probes found and the ids that they should have found. Pure.

Everything is judged over the `K` hits that a probe asks for. The mean average precision is therefore that of the retrieved
hits: a relevant item that is not among them counts as not found.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

K = 10


class Judged(NamedTuple):
    """One probe with known relevance."""

    #: its first hit is relevant
    right: bool
    #: of the relevant ids, at most K, the share that was found
    recall: float
    #: the mean, over as many relevant ids as could be found, of the precision at the place of each; 0 for one that was not
    precision: float


def judge(found: Sequence[str], relevant: Collection[str]) -> Judged:
    """Judge the hits of one probe, best first, against what is relevant, which is not empty."""
    wanted, possible = set(relevant), min(K, len(set(relevant)))
    places = [place for place, item in enumerate(found[:K], start=1) if item in wanted]
    precisions = sum(nth / place for nth, place in enumerate(places, start=1))
    return Judged(bool(places) and places[0] == 1, len(places) / possible, precisions / possible)


def measures(
    found: Sequence[Sequence[str]],
    relevant: Sequence[Collection[str]],
    before: Sequence[Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The quality of what probes found.

    Args:
        found: per probe, its hits, best first.
        relevant: per probe, the ids that it should find; empty where nobody knows.
        before: per probe, what the source model's query found of the same gallery; None where that is not known.

    Returns:
        `probes` that were asked, `judged` of them with known relevance, `k` hits each; `cmc1`, `recall_at_10`, `map` and
        the number of `negative_flips` (right before and wrong now) over the judged ones; `overlap_at_10`, the share of
        the hits before that are hits still, over all. Null where there is nothing to tell it from.
    """
    at = [place for place, wanted in enumerate(relevant) if wanted]
    judged = [judge(found[place], relevant[place]) for place in at]
    flips = None
    if judged and before is not None:
        earlier = [judge(before[place], relevant[place]) for place in at]
        flips = sum(was.right and not now.right for was, now in zip(earlier, judged, strict=True))
    return {
        "probes": len(found),
        "judged": len(judged),
        "k": K,
        "cmc1": _mean([each.right for each in judged]),
        "recall_at_10": _mean([each.recall for each in judged]),
        "map": _mean([each.precision for each in judged]),
        "overlap_at_10": None if before is None else _overlap(before, found),
        "negative_flips": flips,
    }


def _overlap(before: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> float | None:
    return _mean(
        [len(set(was[:K]).intersection(hits[:K])) / len(was[:K]) for was, hits in zip(before, now, strict=True) if was]
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
