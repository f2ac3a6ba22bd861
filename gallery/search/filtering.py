"""Which rows fit a payload filter: asked of the catalog once for each filter and segment, and kept within a bound.

A row's payload never changes, an upsert writes another row; so what was found of a segment is right for as long as it is
there. A filter that comes again costs no database call but for segments that are new.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery import errors
from gallery.arrays import Mask
from gallery.catalog import items as item_rows
from gallery.catalog.filters import compile_filter
from gallery.catalog.tables import SegmentRow
from gallery.catalog.transaction import Catalog
from gallery.snapshot import Snapshot
from gallery.views import SegmentView

#: bytes that an entry takes besides its mask: 290 to 360 were measured, for masks of any length
ENTRY_BYTES = 400
#: the digest of the filter (its text may be longer than the mask), and the id of the segment
_Key = tuple[bytes, int]


def named(condition: Mapping[str, Any]) -> bytes:
    """The digest of a filter; filters that differ only in the order of their names have the same.

    Raises:
        TypeError, ValueError, RecursionError: it is no JSON, or nested too deep.
    """
    return hashlib.sha256(json.dumps(condition, sort_keys=True, allow_nan=False).encode()).digest()


class Filters:
    """The masks of this process; safe from many threads."""

    def __init__(self, catalog: Catalog, limit_bytes: int) -> None:
        """Keep masks, which have a byte for each row, in at most `limit_bytes` of memory."""
        self._catalog = catalog
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._known: OrderedDict[_Key, Mask] = OrderedDict()
        self._bytes = 0

    def masks(self, snapshot: Snapshot, condition: Mapping[str, Any]) -> list[Mask]:
        """Per shelf, the rows whose payload fits; deleted ones may be among them.

        Raises:
            InvalidFilter: the filter cannot be compiled.
            Outdated: segments of the snapshot were merged and reclaimed, so nobody knows any more what fits.
        """
        try:
            name = named(condition)
        except (TypeError, ValueError, RecursionError):
            compile_filter(condition, self._catalog.engine.dialect.name)  # says what is wrong with it
            raise
        with self._lock:
            known = {view.id: self._recall((name, view.id)) for view in snapshot.segments}
        missing = [view for view in snapshot.segments if known[view.id] is None]
        # What is known was compiled before, which takes as long as the rest of a search by a filter that few rows fit.
        if missing or not known:
            compiled = compile_filter(condition, self._catalog.engine.dialect.name)
        if missing:
            with self._catalog.reading() as session:
                found = item_rows.matching(session, snapshot.gallery_id, [view.id for view in missing], compiled)
                _still_there(session, snapshot, missing)
            for view in missing:
                known[view.id] = self._learn((name, view.id), view, found[view.id])
        return [_together([known[view.id] for view in shelf.segments]) for shelf in snapshot.shelves]

    def _recall(self, key: _Key) -> Mask | None:
        mask = self._known.get(key)
        if mask is not None:
            self._known.move_to_end(key)
        return mask

    def _learn(self, key: _Key, view: SegmentView, rows: Any) -> Mask:
        mask = np.zeros(view.rows, dtype=np.bool_)
        mask[rows] = True
        with self._lock:
            if key not in self._known:
                self._known[key] = mask
                self._bytes += ENTRY_BYTES + mask.nbytes
            while self._bytes > self._limit:
                _, oldest = self._known.popitem(last=False)
                self._bytes -= ENTRY_BYTES + oldest.nbytes
        return mask


def _still_there(session: Session, snapshot: Snapshot, views: Sequence[SegmentView]) -> None:
    """Refuse if a segment is gone. Read after the rows that fit: a segment that is there now was there then."""
    there = set(session.scalars(select(SegmentRow.id).where(SegmentRow.gallery_id == snapshot.gallery_id)))
    if not there.issuperset(view.id for view in views):
        raise errors.Outdated(f"segments of {snapshot.gallery} were merged while it was searched; search again")


def _together(masks: Sequence[Mask | None]) -> Mask:
    found = [mask for mask in masks if mask is not None]
    return found[0] if len(found) == 1 else np.concatenate(found)
