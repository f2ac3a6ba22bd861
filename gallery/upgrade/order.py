"""What decides the order of an upgrade's work, measured by a worker before the first segment is leased.

Measuring only reads, and its result is stored by the transaction that lets the work begin: a worker that dies before that
leaves the work as it is stored, and the next one measures again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gallery import errors
from gallery.arrays import Rows
from gallery.catalog import items as item_rows
from gallery.catalog import models as model_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ColumnRow, SegmentRow, UpgradeRow
from gallery.columns import open_column
from gallery.spaces import Transformation
from gallery.store import Store
from gallery.upgrade.plan import Candidate, Order, ordered

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
            return ordered([Candidate(segment.id, segment.rows, hits=segment.hits) for segment, _ in work], by)
        deleted = dict(item_rows.deleted_since(session, upgrade.gallery_id or 0, -1))
    # The digest that the upgrade was started with decides, whatever the transformation's name stands for.
    transformation = replace(model_rows.as_transformation(upgrade.transformation), artifact=upgrade.artifact)
    return ordered(
        [
            Candidate(
                segment.id,
                segment.rows,
                uncertainty=_uncertainty(store, upgrade, transformation, segment, column, deleted.get(segment.id)),
            )
            for segment, column in work
        ],
        by,
    )


def told(work: Sequence[Candidate], by: Order) -> Mapping[str, Any]:
    """What the report says of an order: the first segments, and why they are."""
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


def _uncertainty(
    store: Store,
    upgrade: UpgradeRow,
    transformation: Transformation,
    segment: SegmentRow,
    column: ColumnRow,
    deleted: Rows | None,
) -> float:
    """The mean over the live rows of a segment, or over some of them that lie evenly; -inf if nothing will be derived."""
    takes_side = transformation.side_dimension is not None
    rows = _sample(segment.rows, deleted)
    if not len(rows) or (takes_side and segment.side_file is None and upgrade.missing_side == "skip"):
        return -math.inf
    path = store.files.path
    vectors = open_column(path(column.file), rows=segment.rows, dimension=upgrade.source.dimension)[rows]
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
