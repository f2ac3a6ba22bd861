"""Whether a search is over before another thread could well have begun with it. Pure."""

from __future__ import annotations

from gallery.snapshot import Snapshot

#: numbers that are read: 16 MiB of float32, some 2 ms on one core
_AT_MOST = 1 << 22
_MOST_HITS = 100


def brief(snapshot: Snapshot, model: str, k: int) -> bool:
    """Whether one query of a model, without a filter, takes 2 ms at the most: few rows, all of them by the direct route."""
    work = 0
    for shelf in snapshot.shelves:
        if not shelf.live:
            continue
        index = shelf.indexes.get(model)
        if index is None:
            return False
        work += index.reads
        if work > _AT_MOST:
            return False
    return k <= _MOST_HITS
