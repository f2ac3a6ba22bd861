"""Rows of segments and columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy import bindparam, exists, select, update
from sqlalchemy.orm import Session, aliased

from gallery.catalog.tables import ColumnRow, GalleryRow, ItemRow, ModelRow, SegmentRow, TransformationRow
from gallery.files import Written

Origin = Literal["native", "derived"]

# What stands with the parameters of an index: its recall; and, by backend, that of those which found too little.
MEASURED, REFUSED = "recall_at_10", "refused"


def add_segment(
    session: Session,
    *,
    gallery_id: int,
    version: int,
    rows: int,
    ids: Written,
    side: Written | None,
    side_dimension: int | None,
) -> SegmentRow:
    """Record a segment whose files are durable."""
    row = SegmentRow(
        gallery_id=gallery_id,
        version=version,
        rows=rows,
        ids_file=ids.name,
        ids_sha256=ids.sha256,
        ids_bytes=ids.bytes,
        side_file=side.name if side else None,
        side_sha256=side.sha256 if side else None,
        side_bytes=side.bytes if side else None,
        side_dimension=side_dimension if side else None,
    )
    session.add(row)
    session.flush()
    return row


def add_column(
    session: Session,
    *,
    segment_id: int,
    model_id: int,
    written: Written,
    dtype: str,
    origin: Origin,
    published: bool,
    transformation_id: int | None = None,
    upgrade_id: str | None = None,
) -> ColumnRow:
    """Record a column whose file is durable."""
    row = ColumnRow(
        segment_id=segment_id,
        model_id=model_id,
        origin=origin,
        transformation_id=transformation_id,
        upgrade_id=upgrade_id,
        published=published,
        dtype=dtype,
        file=written.name,
        sha256=written.sha256,
        bytes=written.bytes,
        index_kind="flat",
        index_parameters={},
    )
    session.add(row)
    session.flush()
    return row


def set_index(column: ColumnRow, kind: str, parameters: dict[str, Any], written: Written) -> None:
    """Record the index file of a column."""
    column.index_kind, column.index_parameters = kind, parameters
    column.index_file, column.index_sha256, column.index_bytes = written.name, written.sha256, written.bytes


def column_of(session: Session, segment_id: int, model_id: int) -> ColumnRow | None:
    """A segment's column of a model, published or not."""
    return session.scalar(select(ColumnRow).where(ColumnRow.segment_id == segment_id, ColumnRow.model_id == model_id))


def indexes_of(session: Session, gallery_id: int) -> dict[str, list[Mapping[str, Any]]]:
    """By model, the segments whose recall was measured, and how they are searched: by an index, or exactly after all."""
    rows = session.execute(
        select(ModelRow.name, ColumnRow.segment_id, SegmentRow.rows, ColumnRow.index_kind, ColumnRow.index_parameters)
        .join_from(ColumnRow, SegmentRow)
        .join(ModelRow, ModelRow.id == ColumnRow.model_id)
        .where(
            SegmentRow.gallery_id == gallery_id,
            SegmentRow.retired_at.is_(None),
            ColumnRow.index_parameters[MEASURED].as_float().is_not(None),
        )
        .order_by(ColumnRow.segment_id)
    )
    found: dict[str, list[Mapping[str, Any]]] = {}
    for model, segment, count, kind, parameters in rows:
        found.setdefault(model, []).append({"segment": segment, "rows": count, "kind": kind, **parameters})
    return found


def made_by(session: Session, segment_id: int) -> dict[str, str | None]:
    """By model, the transformation that made a segment's column; null where the column is native."""
    rows = session.execute(
        select(ModelRow.name, TransformationRow.name)
        .select_from(ColumnRow)
        .join(ModelRow, ModelRow.id == ColumnRow.model_id)
        .outerjoin(TransformationRow, TransformationRow.id == ColumnRow.transformation_id)
        .where(ColumnRow.segment_id == segment_id)
    )
    return dict(rows.all())


def without_model(session: Session, gallery_id: int, model_id: int) -> list[SegmentRow]:
    """Segments of a gallery that have live items and no column of a model: found by a join, never by comparing counts."""
    column = aliased(ColumnRow)
    has = exists().where(column.segment_id == SegmentRow.id, column.model_id == model_id)
    live = exists().where(ItemRow.segment_id == SegmentRow.id, ItemRow.deleted_version.is_(None))
    return list(
        session.scalars(
            select(SegmentRow).where(SegmentRow.gallery_id == gallery_id, live, ~has).order_by(SegmentRow.id)
        )
    )


def add_hits(session: Session, gallery_id: int, hits: Mapping[int, int]) -> None:
    """Add to the hits of segments; one that is gone is passed over.

    The gallery's row is locked first, as every writer of it does: a deletion of the gallery locks the same segments in an
    order of its own, and the two would wait for each other. Its version stays, since no search sees anything of this.
    """
    session.execute(select(GalleryRow.id).where(GalleryRow.id == gallery_id).with_for_update())
    session.connection().execute(
        update(SegmentRow)
        .where(SegmentRow.id == bindparam("segment"), SegmentRow.gallery_id == gallery_id)
        .values(hits=SegmentRow.hits + bindparam("more")),
        [{"segment": segment, "more": more} for segment, more in hits.items()],
    )
