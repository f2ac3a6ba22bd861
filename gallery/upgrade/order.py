"""What decides the order of an upgrade's work, measured by a worker before the first segment is leased.

Measuring only reads, and its result is stored by the transaction that lets the work begin: a worker that dies before that
leaves the work as it is stored, and the next one measures again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gallery import errors
from gallery.arrays import Rows
from gallery.catalog import items as item_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import SegmentRow, UpgradeRow
from gallery.columns import open_column
from gallery.store import Store
from gallery.upgrade import sources
from gallery.upgrade.plan import Candidate, Order, ordered
from gallery.upgrade.sources import Source

# The mean of this many rows is within 1/64 of their standard deviation, closer than segments need to be told apart, and a
# segment of a million rows costs no more than one of this size.
SAMPLE_ROWS = 4096
_SHOWN = 10


def measure(store: Store, upgrade: UpgradeRow) -> list[Candidate]:
    """The segments of an upgrade in the order of its work, each with what decided it; none where it is that of storage.

    Raises:
        WrongTransformation: the order is by uncertainty, and the transformation predicts none, or none that is finite.
    """
    by = Order(upgrade.order)
    if by is Order.STORED:
        return []
    with store.catalog.reading() as session:
        work = upgrade_rows.work(session, upgrade)
        if by is Order.MOST_SEARCHED:
            return ordered([Candidate(segment.id, segment.rows, hits=segment.hits) for segment in work], by)
        deleted = item_rows.deleted_since(session, upgrade.gallery_id or 0, -1)
        made_from = sources.of_segments(session, upgrade, work)
    return ordered(
        [
            Candidate(
                segment.id, segment.rows, uncertainty=_uncertainty(store, segment, source, deleted.get(segment.id))
            )
            for segment, source in zip(work, made_from, strict=True)
        ],
        by,
    )


def told(work: Sequence[Candidate], by: Order) -> Mapping[str, Any]:
    """What the report says of an order: the first segments, and why they go first."""
    if by is Order.STORED:
        return {}
    first = [
        {
            "segment": each.segment_id,
            "items": each.rows,
            **({"hits": each.hits} if by is Order.MOST_SEARCHED else {"uncertainty": _finite(each.uncertainty)}),
        }
        for each in work[:_SHOWN]
    ]
    return {"first_segments": first}


def _uncertainty(store: Store, segment: SegmentRow, source: Source | None, deleted: Rows | None) -> float:
    """The mean over live rows of a segment, at most `SAMPLE_ROWS` of them, evenly spread; -inf if nothing will be derived."""
    rows = _sample(segment.rows, deleted)
    if not len(rows) or source is None:
        return -math.inf
    path, transformation = store.files.path, source.transformation
    vectors = open_column(path(source.column.file), rows=segment.rows, dimension=source.dimension)[rows]
    side = None
    if segment.side_file is not None and transformation.side_dimension is not None:
        side = open_column(path(segment.side_file), rows=segment.rows, dimension=transformation.side_dimension)[rows]
    mean = float(store.transforms.uncertainty(transformation, vectors, side).mean(dtype=np.float64))
    if not math.isfinite(mean):
        raise errors.WrongTransformation(
            f"{transformation.name} predicts an uncertainty of {mean} for segment {segment.id}, which has no place in an order"
        )
    return mean


def _sample(rows: int, deleted: Rows | None) -> Rows:
    """At most `SAMPLE_ROWS` of the live rows, evenly spread."""
    live = np.arange(rows) if deleted is None else np.setdiff1d(np.arange(rows), deleted)
    return live[:: max(1, -(-len(live) // SAMPLE_ROWS))]


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None
