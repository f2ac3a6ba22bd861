"""Search quality as a client measures it: from the ids that a running service answers, and known labels.

CMC-1 comes from short lists, as searches are: on a `forward` route the service then looks at a few candidates only, which
is what users get. mAP needs the whole ranking, so it comes from lists as long as the gallery.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from forwardfill.answers import BatchAnswer, Routes
from forwardfill.client import Client
from models.evaluation import cmc_from_ranking, map_from_ranking, ranked_relevance

Floats = npt.NDArray[np.float32]

#: hits of a search for CMC-1: the own item, which is left out, and the ten that a user would see
SHORT = 11
#: keeps answers to some 60 MB
HITS_PER_REQUEST = 1_000_000


class GalleryMovedError(Exception):
    """The gallery changed to another version while it was measured, so it must be measured again."""


class Quality(NamedTuple):
    """Shares, 0 to 1."""

    cmc1: float
    map: float


class Measurement(NamedTuple):
    """Quality at one version of a gallery."""

    quality: Quality
    #: items that were searched in the query's own space
    fraction: float
    version: int
    seconds: float


class Queries(NamedTuple):
    """One vector per item, embedded by one model."""

    model: str
    #: (items, dimension)
    vectors: Floats
    #: the same by other models
    companions: Mapping[str, Floats]


@dataclass(frozen=True, slots=True)
class Exam:
    """Labelled queries: every item is one that should find the others of its label; its own id is left out of its answer."""

    client: Client
    ids: tuple[str, ...]
    #: (items,)
    labels: npt.NDArray[np.int64]
    #: which items ask for CMC-1, and which for mAP
    short: npt.NDArray[np.int64]
    whole: npt.NDArray[np.int64]
    label_of: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label_of", dict(zip(self.ids, self.labels.tolist(), strict=True)))

    def take(self, gallery: str, queries: Queries, *, attempts: int = 3) -> Measurement:
        """Measure one version of a gallery.

        Raises:
            GalleryMovedError: it never stayed at one version for long enough.
        """
        for _ in range(attempts):
            start = time.perf_counter()
            try:
                return self._take(gallery, queries, start)
            except GalleryMovedError:
                continue
        raise GalleryMovedError(gallery)

    def _take(self, gallery: str, queries: Queries, start: float) -> Measurement:
        seen: list[BatchAnswer] = []
        quality = Quality(
            cmc1=self._score(cmc_from_ranking, gallery, queries, self.short, min(SHORT, len(self.ids)), seen),
            map=self._score(map_from_ranking, gallery, queries, self.whole, len(self.ids), seen),
        )
        served = seen[0]["served"]
        seconds = time.perf_counter() - start
        return Measurement(quality, fraction_of(served["routes"]), served["gallery_version"], seconds)

    def _score(
        self,
        measure: Any,
        gallery: str,
        queries: Queries,
        rows: npt.NDArray[np.int64],
        k: int,
        seen: list[BatchAnswer],
    ) -> float:
        """One measure over some items' answers, averaged over requests."""
        total = 0.0
        for part in _parts(rows, k):
            answer = self._ask(gallery, queries, part, k)
            if seen and answer["served"]["gallery_version"] != seen[0]["served"]["gallery_version"]:
                raise GalleryMovedError(gallery)
            own = [self.ids[row] for row in part]
            ranked = [[hit["id"] for hit in result["hits"]] for result in answer["results"]]
            relevance, relevant = ranked_relevance(ranked, self.labels[part].tolist(), self.label_of, own=own)
            total += measure(relevance, relevant) * len(part)
            seen.append({**answer, "results": []})
        return total / len(rows)

    def _ask(self, gallery: str, queries: Queries, rows: npt.NDArray[np.int64], k: int) -> BatchAnswer:
        companions = {name: vectors[rows] for name, vectors in queries.companions.items()}
        # When every item is asked for, there are no more candidates than hits.
        oversample = 1 if k == len(self.ids) else None
        return self.client.search_batch(
            gallery, queries.model, queries.vectors[rows], k=k, companions=companions, oversample=oversample
        )


def fraction_of(routes: Routes) -> float:
    """The part of the items that was searched in the query's own space, as an answer tells."""
    return routes["direct"] / max(1, routes["direct"] + routes["forward"])


def _parts(rows: npt.NDArray[np.int64], k: int) -> Iterator[npt.NDArray[np.int64]]:
    size = max(1, min(1000, HITS_PER_REQUEST // k))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
