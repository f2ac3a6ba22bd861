"""Whether a search is so brief that it is done on the event loop: handing it to a thread would take longer."""

from __future__ import annotations

from collections.abc import Callable

from gallery.search.request import Answer
from gallery.search.routes import Plan
from gallery.snapshot import Snapshot

#: most numbers that are read: 16 MiB of float32, some 2 ms on one core
AT_MOST = 1 << 22
#: most weights that are applied to candidates and queries: some 0.5 ms
MOST_WEIGHTS = 1 << 23
MOST_HITS = 100
#: candidates of one call, which are in memory together: queries times hits times oversample
MOST_CANDIDATES = 1 << 20


class NotBrief(Exception):
    """A search would have to transform too much for the event loop; `args` names the transformation.

    Attributes:
        rest: goes on where it stopped, and transforms whatever there is; None where nothing was begun.
    """

    rest: Callable[[], Answer] | None = None


def reads(snapshot: Snapshot, planned: Plan) -> int | None:
    """How many numbers one query reads, more or less; None where all rows of some shelf are candidates. Pure."""
    work = 0
    for shelf, way in zip(snapshot.shelves, planned.ways, strict=True):
        if way is None:
            continue
        if way.exhaustive:
            return None
        work += shelf.indexes[way.column].reads
    return work
