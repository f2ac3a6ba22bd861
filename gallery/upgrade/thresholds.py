"""My cut-off was 0.75: what is it in the new space? Pure.

A threshold belongs to one space, and its number means nothing in another. What can be kept is its effect: the share of hits that
it accepts, or where relevance is known, its precision or its recall. All three are computed from the hits of the same probes in
both spaces.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gallery.arrays import Metric


class Scored(NamedTuple):
    """The hits of probes in one space."""

    metric: Metric
    #: (hits,) scores
    scores: NDArray[np.float64]
    #: (hits,) whether the hit is relevant; only where `known`
    relevant: NDArray[np.bool_]
    #: (hits,) whether the relevance of the hit's probe is known
    known: NDArray[np.bool_]
    #: relevant ids over all probes, as many of each as it could find
    wanted: int

    @property
    def costs(self) -> NDArray[np.float64]:
        """Smaller is better, whatever the metric."""
        return self.scores if self.metric == "euclidean" else -self.scores


def carried_over(threshold: float, before: Scored, after: Scored) -> dict[str, Any]:
    """What becomes of a threshold on the scores of the source model's queries.

    Returns:
        `before`; `after`, which accepts the same share of hits; how many hits that were `accepted_before` of
        `hits_before` and are `accepted_after` of `hits_after`; `same_precision` and `same_recall`, the thresholds that
        keep these where relevance is known, and the `precision_before` and `recall_before` that they keep. Null with a
        `reason` where the probes cannot tell.
    """
    limit = threshold if before.metric == "euclidean" else -threshold
    accepted = before.costs <= limit
    told: dict[str, Any] = {
        "before": threshold,
        "after": None,
        "keeps": "share_of_hits",
        "accepted_before": int(accepted.sum()),
        "hits_before": len(accepted),
        "accepted_after": None,
        "hits_after": len(after.scores),
        **_by_relevance(limit, before, after),
        "reason": None,
    }
    if not len(accepted) or not len(after.scores):
        return {**told, "reason": "the probes found nothing"}
    kept = _keeping_share(accepted.mean(), np.sort(after.costs))
    told |= {"after": _score(kept, after.metric), "accepted_after": int((after.costs <= kept).sum())}
    if accepted.all() or not accepted.any():
        every = "every hit" if accepted.all() else "no hit"
        told["reason"] = f"{every} of the probes was accepted, so this is only a bound"
    return told


def unknown(threshold: float, reason: str) -> dict[str, Any]:
    """What is told of a threshold where nothing was measured."""
    return {"before": threshold, "after": None, "keeps": "share_of_hits", "reason": reason}


def _keeping_share(share: float, costs: NDArray[np.float64]) -> float:
    """The cost between the last hit that is accepted and the first that is not."""
    many = round(share * len(costs))
    if many == 0:
        return float(np.nextafter(np.float32(costs[0]), np.float32(-np.inf)))
    if many == len(costs):
        return float(costs[-1])
    return float((costs[many - 1] + costs[many]) / 2)


def _by_relevance(limit: float, before: Scored, after: Scored) -> dict[str, Any]:
    """Precision and recall before, and the thresholds that keep each; null where relevance is not known."""
    told: dict[str, Any] = dict.fromkeys(("precision_before", "same_precision", "recall_before", "same_recall"))
    accepted = before.known & (before.costs <= limit)
    right = int((accepted & before.relevant).sum())
    costs, hits = after.costs[after.known], after.relevant[after.known]
    order = np.argsort(costs, kind="stable")
    costs, found = costs[order], np.cumsum(hits[order])
    # Equal scores are accepted together: a threshold can only lie behind the last of them.
    last = np.append(costs[1:] > costs[:-1], True) if len(costs) else np.empty(0, np.bool_)
    if accepted.any():
        told["precision_before"] = right / int(accepted.sum())
        precise = np.flatnonzero(last & (found / np.arange(1, len(costs) + 1) >= told["precision_before"]))
        told["same_precision"] = _score(costs[precise[-1]], after.metric) if len(precise) else None
    if before.wanted and after.wanted:
        told["recall_before"] = right / before.wanted
        enough = np.flatnonzero(last & (found / after.wanted >= told["recall_before"]))
        told["same_recall"] = _score(costs[enough[0]], after.metric) if len(enough) else None
    return told


def _score(cost: float, metric: Metric) -> float:
    return float(cost) if metric == "euclidean" else -float(cost)
