"""Rows of a compaction: what may be merged, and the items that move to the segment that takes over.

An item moves by the means of an upsert: its old row is marked as deleted, and a new row is live. So a snapshot that still
has the old segments finds its payloads and its filters' rows as before, until the retired rows are reclaimed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import numpy as np
from sqlalchemy import and_, case, delete, func, insert, literal, null, select, update
from sqlalchemy.orm import Session

from gallery.arrays import Dtype, Origin, Rows
from gallery.catalog.tables import (
    ColumnRow,
    GalleryRow,
    ItemRow,
    SegmentRow,
    UpgradeRow,
    UpgradeSegmentRow,
    now,
)
from gallery.lineage import Lineage, from_json


class ColumnKind(NamedTuple):
    """What columns must have in common to become one: nothing of where a vector came from is lost."""

    model_id: int
    origin: Origin
    transformation_id: int | None
    upgrade_id: str | None
    lineage: Lineage
    published: bool
    dtype: Dtype


class Kind(NamedTuple):
    """What segments must have in common to become one."""

    side_dimension: int | None
    #: by model
    columns: tuple[ColumnKind, ...]


class Facts(NamedTuple):
    """What must not change of a segment between its reading and the publication of what it was merged into."""

    segment_id: int
    rows: int
    kind: Kind
    #: an active upgrade has work for it, or made a column of it
    held: bool


class Look(NamedTuple):
    """A gallery that may want compacting, as it was when a worker looked."""

    gallery_id: int
    version: int
    asked_at: datetime | None
    #: the active upgrade: once it is over, what it held may be merged, although the gallery's version is the same
    upgrade_id: str | None


def galleries(session: Session) -> list[Look]:
    """Every gallery, as it is now."""
    rows = session.execute(
        select(GalleryRow.id, GalleryRow.version, GalleryRow.compact_asked_at, UpgradeRow.id)
        .outerjoin(UpgradeRow, and_(UpgradeRow.gallery_id == GalleryRow.id, UpgradeRow.active))
        .order_by(GalleryRow.id)
    )
    return [Look(*row) for row in rows]


def facts(session: Session, gallery_id: int) -> dict[int, Facts]:
    """The facts of a gallery's segments by id. Deletions are no part of them: they may go on while segments are merged."""
    there = (SegmentRow.gallery_id == gallery_id, SegmentRow.retired_at.is_(None))
    columns: dict[int, list[ColumnKind]] = defaultdict(list)
    for row in session.scalars(
        select(ColumnRow).join(SegmentRow).where(*there).order_by(ColumnRow.segment_id, ColumnRow.model_id)
    ):
        columns[row.segment_id].append(
            ColumnKind(
                model_id=row.model_id,
                origin=row.origin,
                transformation_id=row.transformation_id,
                upgrade_id=row.upgrade_id,
                lineage=from_json(row.lineage),
                published=row.published,
                dtype=row.dtype,
            )
        )
    held = _held(session, gallery_id)
    return {
        row.id: Facts(
            row.id,
            row.rows,
            Kind(row.side_dimension, tuple(columns[row.id])),
            row.id in held or any(kind.upgrade_id in held for kind in columns[row.id]),
        )
        for row in session.scalars(select(SegmentRow).where(*there).order_by(SegmentRow.id))
    }


def live(session: Session, gallery_id: int) -> dict[int, int]:
    """How many rows of each of a gallery's segments are live."""
    rows = session.execute(select(SegmentRow.id, SegmentRow.live).where(SegmentRow.gallery_id == gallery_id))
    return dict(rows.all())


def segments(session: Session, ids: Collection[int]) -> list[SegmentRow]:
    """These segments, in the order of their ids."""
    return list(session.scalars(select(SegmentRow).where(SegmentRow.id.in_(ids)).order_by(SegmentRow.id)))


def columns(session: Session, ids: Collection[int]) -> dict[int, list[ColumnRow]]:
    """The columns of these segments by model, in the order of the segments' ids."""
    found: dict[int, list[ColumnRow]] = defaultdict(list)
    rows = session.scalars(select(ColumnRow).where(ColumnRow.segment_id.in_(ids)).order_by(ColumnRow.segment_id))
    for column in rows:
        found[column.model_id].append(column)
    return dict(found)


def live_rows(session: Session, segments: Sequence[SegmentRow]) -> list[Rows]:
    """Of each segment, the rows that are live, ascending."""
    deleted: dict[int, list[int]] = defaultdict(list)
    there = (ItemRow.segment_id.in_([segment.id for segment in segments]), ItemRow.deleted_version.is_not(None))
    for segment_id, row in session.execute(select(ItemRow.segment_id, ItemRow.row).where(*there)):
        deleted[segment_id].append(row)
    return [np.setdiff1d(np.arange(segment.rows, dtype=np.int64), deleted[segment.id]) for segment in segments]


def move_items(session: Session, old: Collection[int], new: int, *, read_at: int, version: int) -> tuple[int, int]:
    """Give the items that were live at version `read_at` their rows in the new segment.

    The caller holds the gallery's row at `version`, which no other mark has. Rows come in the order of the old segments'
    ids and their rows. What was deleted since `read_at` has a row in the new segment's files, so it gets one here too, with
    its mark: deleted before anyone saw the segment.

    Returns:
        How many rows the new segment has, and how many of them are deleted.
    """
    mark_moved(session, old, version)
    row = func.row_number().over(order_by=(ItemRow.segment_id, ItemRow.row)) - 1
    was_live = case((ItemRow.deleted_version == version, null()), else_=literal(version))
    moved = select(literal(new), row, ItemRow.gallery_id, ItemRow.item_id, ItemRow.payload, was_live).where(
        ItemRow.segment_id.in_(old), ItemRow.deleted_version > read_at
    )
    names = ["segment_id", "row", "gallery_id", "item_id", "payload", "deleted_version"]
    session.execute(insert(ItemRow).from_select(names, moved))
    counted = select(func.count(), func.count(ItemRow.deleted_version)).where(ItemRow.segment_id == new)
    rows, dead = session.execute(counted).one()
    return rows, dead


def mark_moved(session: Session, old: Collection[int], version: int) -> None:
    """Mark what is live in these segments as deleted since `version`."""
    session.execute(
        update(ItemRow)
        .where(ItemRow.segment_id.in_(old), ItemRow.deleted_version.is_(None))
        .values(deleted_version=version)
        .execution_options(synchronize_session=False)
    )
    session.execute(
        update(SegmentRow)
        .where(SegmentRow.id.in_(old))
        .values(dead=SegmentRow.rows)
        .execution_options(synchronize_session=False)
    )


def retire(session: Session, ids: Collection[int]) -> None:
    """Searches that begin now do not see these segments any more."""
    session.execute(
        update(SegmentRow)
        .where(SegmentRow.id.in_(ids))
        .values(retired_at=now())
        .execution_options(synchronize_session=False)
    )


def retired_before(session: Session, moment: datetime) -> Mapping[int, Sequence[int]]:
    """Segments that were retired before a moment, by gallery."""
    found: dict[int, list[int]] = defaultdict(list)
    for gallery, segment in session.execute(
        select(SegmentRow.gallery_id, SegmentRow.id).where(SegmentRow.retired_at < moment)
    ):
        found[gallery].append(segment)
    return found


def remove(session: Session, gallery_id: int, ids: Sequence[int]) -> list[str]:
    """Delete the rows of retired segments; returns the names of their files.

    The gallery's row is locked first, as every writer does, or a deletion of the gallery and this would wait for each other.
    """
    session.execute(select(GalleryRow.id).where(GalleryRow.id == gallery_id).with_for_update())
    names = [name for row in segments(session, ids) for name in (row.ids_file, row.side_file) if name]
    for of_model in columns(session, ids).values():
        names += [name for column in of_model for name in (column.file, column.index_file) if name]
    for table in (UpgradeSegmentRow, ItemRow, ColumnRow):
        session.execute(delete(table).where(table.segment_id.in_(ids)))
    session.execute(delete(SegmentRow).where(SegmentRow.id.in_(ids)))
    return names


def answered(session: Session, look: Look) -> None:
    """Record that the compaction that was asked for is done, unless it was asked for again meanwhile."""
    session.execute(
        update(GalleryRow)
        .where(GalleryRow.id == look.gallery_id, GalleryRow.compact_asked_at == look.asked_at)
        .values(compact_asked_at=None)
        .execution_options(synchronize_session=False)
    )


def _held(session: Session, gallery_id: int) -> set[int | str | None]:
    """The ids of active upgrades, and of the segments that they have work for."""
    active = set(session.scalars(select(UpgradeRow.id).where(UpgradeRow.gallery_id == gallery_id, UpgradeRow.active)))
    if not active:
        return set()
    work = session.scalars(select(UpgradeSegmentRow.segment_id).where(UpgradeSegmentRow.upgrade_id.in_(active)))
    return {*active, *work}
