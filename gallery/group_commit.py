"""Small writes that meet are one commit.

A commit waits several times for the disk, whether it is of one item or of a thousand, and commits of one gallery follow each
other. So without this, clients that write one item at a time get no further together than one of them does alone. What arrives
while others are being committed is committed next, together: a group takes what one of its requests would have taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

from gallery import ingest
from gallery.catalog.transaction import UNANSWERED
from gallery.ingest import Deleted, Upserted
from gallery.new_items import NewItems
from gallery.store import Store
from gallery.together import Together

#: a request with more items than this is a commit of its own: others would wait for what it takes to write them
_SMALL = 64
#: items of one commit
_MOST = 1_000


class GroupCommit:
    """Gathers writes; one per process, safe from many threads."""

    def __init__(self, store: Store, together: Together) -> None:
        """Write to `store`; what gathers in `together`, by one commit. More than one lane would leave less to gather."""
        self._store = store
        self._together = together

    def upsert(self, gallery: str, items: NewItems) -> Upserted:
        """Write items as `ingest.upsert` does, those of others with them.

        Raises:
            GalleryError: as `ingest.upsert`; never for the sake of another's items.
        """
        if len(items.ids) > _SMALL:
            return ingest.upsert(self._store, gallery, items)
        act = partial(ingest.upsert_each, self._store, gallery)
        kind = ("upsert", gallery, items.model)
        return ingest.settled(self._together.do(kind, items, act, most=_upserts_at_once, for_all=UNANSWERED))

    def delete(self, gallery: str, ids: Sequence[str]) -> Deleted:
        """Delete items as `ingest.delete` does, those of others with them.

        Raises:
            GalleryNotFound: none has the name.
        """
        if len(ids) > _SMALL:
            return ingest.delete(self._store, gallery, ids)
        act = partial(ingest.delete_each, self._store, gallery)
        return self._together.do(("delete", gallery), ids, act, most=_deletes_at_once, for_all=UNANSWERED)


def _upserts_at_once(waiting: Sequence[NewItems]) -> int:
    """How many requests, in the order in which they came, may be one commit: not too many items, and no id in two of them."""
    ids: set[str] = set()
    for count, items in enumerate(waiting):
        if count and (len(ids) + len(items.ids) > _MOST or not ids.isdisjoint(items.ids)):
            return count
        ids.update(items.ids)
    return len(waiting)


def _deletes_at_once(waiting: Sequence[Sequence[str]]) -> int:
    """Likewise; an id may be in two of them, as it may be deleted twice."""
    return max(1, sum(total <= _MOST for total in accumulate(map(len, waiting))))
