"""In which segments searches find their hits: what the order `most_searched` of an upgrade follows.

Counted in memory, because a search asks no database, and now and then added to the catalog, where all processes' counts
meet.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from gallery.catalog import segments as segment_rows
from gallery.catalog.transaction import Catalog
from gallery.search.request import Answer

# Answers hold their snapshot with its indexes. So they are counted once so many wait, or one of a newer snapshot comes.
_AT_ONCE = 256


class Hits:
    """What was counted since it was last written; one per process, safe from many threads."""

    def __init__(self) -> None:
        """Start at zero."""
        self._lock = threading.Lock()
        #: by gallery, answers that are not counted yet, all of one snapshot: counting many at once costs little more than one
        self._waiting: dict[int, list[Answer]] = {}
        #: per gallery and segment
        self._counted: dict[int, Counter[int]] = {}

    def count(self, answer: Answer) -> None:
        """Count what one search found."""
        gallery_id, done = answer.snapshot.gallery_id, list[Answer]()
        with self._lock:
            waiting = self._waiting.setdefault(gallery_id, [])
            if len(waiting) >= _AT_ONCE or (waiting and waiting[0].snapshot is not answer.snapshot):
                done, self._waiting[gallery_id] = waiting, [answer]
            else:
                waiting.append(answer)
        if done:
            self._fold(done)

    def _fold(self, answers: Sequence[Answer]) -> None:
        """Count what some searches found in one snapshot."""
        snapshot = answers[0].snapshot
        segments = np.concatenate([answer.segments.reshape(-1) for answer in answers])
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
            waiting, self._waiting = self._waiting, {}
        for answers in waiting.values():
            self._fold(answers)
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
