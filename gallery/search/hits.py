"""In which segments searches find their hits: what the order `most_searched` of an upgrade follows.

Counted in memory, because a search asks no database, and now and then added to the catalog, where all processes' counts
meet.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from gallery.catalog import segments as segment_rows
from gallery.catalog.transaction import Catalog
from gallery.search.request import Answer

# Answers hold their snapshot, so they wait for no more than this, or for the next time that hits are written.
_AT_ONCE = 256


class Hits:
    """What was counted since it was last written; one per process, safe from many threads."""

    def __init__(self) -> None:
        """Start at zero."""
        self._lock = threading.Lock()
        #: not counted yet: counting many at once costs little more than one
        self._waiting: list[Answer] = []
        #: per gallery and segment
        self._counted: dict[int, Counter[int]] = {}

    def count(self, answer: Answer) -> None:
        """Count what one search found."""
        with self._lock:
            self._waiting.append(answer)
            if len(self._waiting) < _AT_ONCE:
                return
            waiting, self._waiting = self._waiting, []
        self._fold(waiting)

    def _fold(self, answers: Iterable[Answer]) -> None:
        """Count what many searches found, those of one snapshot together."""
        by_snapshot: dict[int, list[Answer]] = {}
        for answer in answers:
            by_snapshot.setdefault(id(answer.snapshot), []).append(answer)
        for same in by_snapshot.values():
            snapshot = same[0].snapshot
            segments = np.concatenate([answer.segments.reshape(-1) for answer in same])
            counts = np.bincount(segments[segments >= 0])
            places = np.flatnonzero(counts)
            found = {snapshot.segments[at].id: hits for at, hits in zip(places, counts[places].tolist(), strict=True)}
            if found:
                self._add(snapshot.gallery_id, found)

    def write(self, catalog: Catalog) -> None:
        """Add what was counted to the catalog; what cannot be written is kept for the next time.

        One transaction for each gallery: it may have to wait for a writer of that gallery, and must not hold up those of
        another meanwhile.
        """
        with self._lock:
            waiting, self._waiting = self._waiting, []
        self._fold(waiting)
        with self._lock:
            taken, self._counted = self._counted, {}
        try:
            for gallery_id in list(taken):
                with catalog.transaction() as tx:
                    segment_rows.add_hits(tx.session, gallery_id, taken[gallery_id])
                del taken[gallery_id]
        finally:
            for gallery_id, hits in taken.items():
                self._add(gallery_id, hits)

    def _add(self, gallery_id: int, hits: Mapping[int, int]) -> None:
        with self._lock:
            self._counted.setdefault(gallery_id, Counter()).update(hits)
