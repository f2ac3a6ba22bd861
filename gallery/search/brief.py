"""How much a search reads: whether it is over before another thread could well have begun with it."""

from __future__ import annotations

from gallery.snapshot import Snapshot, World

#: numbers that are read: 16 MiB of float32, some 2 ms on one core
AT_MOST = 1 << 22
MOST_HITS = 100


def reads(world: World, snapshot: Snapshot, model: str) -> int | None:
    """How many numbers one query of a model reads, more or less; None where it is not direct for all live segments."""
    key = (snapshot.gallery_id, model)
    if key not in world.memo:
        world.memo[key] = _reads(snapshot, model)
    found: int | None = world.memo[key]
    return found


def _reads(snapshot: Snapshot, model: str) -> int | None:
    work = 0
    for shelf in snapshot.shelves:
        if not shelf.live:
            continue
        index = shelf.indexes.get(model)
        if index is None:
            return None
        work += index.reads
    return work
