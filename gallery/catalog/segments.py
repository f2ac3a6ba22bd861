"""Rows of segments and columns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Select, and_, bindparam, exists, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from gallery.arrays import Dtype, Origin
from gallery.catalog.tables import ColumnRow, GalleryRow, ItemRow, ModelRow, SegmentRow
from gallery.files import Written
from gallery.lineage import EXACT, Lineage, Step, as_json, from_json
from gallery.spaces import Transformation

T = TypeVar("T")
_CHUNK = 5_000  # bound parameters of one statement; SQLite allows 32,766

# Keys beside the parameters of an index: its recall; and the recall of each backend that was tried and found too little.
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
    dtype: Dtype,
    origin: Origin,
    published: bool,
    transformation_id: int | None = None,
    upgrade_id: str | None = None,
    lineage: Lineage = (),
) -> ColumnRow:
    """Record a column whose file is durable."""
    row = ColumnRow(
        segment_id=segment_id,
        model_id=model_id,
        origin=origin,
        transformation_id=transformation_id,
        upgrade_id=upgrade_id,
        lineage=as_json(lineage),
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


def made(source: ColumnRow, by: Transformation, computed_in: str = EXACT) -> Lineage:
    """The lineage of what a transformation makes of a column."""
    return (*from_json(source.lineage), Step(by.name, by.artifact, by.source, computed_in))


def set_index(column: ColumnRow, kind: str, parameters: dict[str, Any], written: Written) -> None:
    """Record the index file of a column."""
    column.index_kind, column.index_parameters = kind, parameters
    column.index_file, column.index_sha256, column.index_bytes = written.name, written.sha256, written.bytes


def drop_index(column: ColumnRow) -> None:
    """Forget the index file of a column, which is searched exactly until it has another."""
    column.index_kind, column.index_parameters = "flat", {}
    column.index_file = column.index_sha256 = column.index_bytes = None


def naming(session: Session, file: str) -> tuple[SegmentRow | None, ColumnRow | None]:
    """The segment and the column that a file belongs to.

    A file of vectors or an index has both, one of ids or side-information a segment only. Neither where no row names the file.
    """
    either = or_(ColumnRow.file == file, ColumnRow.index_file == file)
    found = session.execute(select(SegmentRow, ColumnRow).join(ColumnRow).where(either)).first()
    if found is not None:
        return found[0], found[1]
    either = or_(SegmentRow.ids_file == file, SegmentRow.side_file == file)
    return session.scalar(select(SegmentRow).where(either)), None


def columns_of(session: Session, segments: Sequence[int]) -> dict[int, dict[str, ColumnRow]]:
    """The columns of segments, published or not, by segment and the model's name."""
    found: dict[int, dict[str, ColumnRow]] = {}
    for start in range(0, len(segments), _CHUNK):
        chunk = segments[start : start + _CHUNK]
        rows = session.execute(
            select(ColumnRow, ModelRow.name)
            .join(ModelRow, ModelRow.id == ColumnRow.model_id)
            .where(ColumnRow.segment_id.in_(chunk))
        )
        for column, model in rows:
            found.setdefault(column.segment_id, {})[model] = column
    return found


def without_model(session: Session, gallery_id: int, model_id: int) -> list[SegmentRow]:
    """Segments of a gallery that have live items and no column of a model.

    Found by a join, and not by comparing counts, in which two errors may cancel out.
    """
    column = aliased(ColumnRow)
    has = exists().where(column.segment_id == SegmentRow.id, column.model_id == model_id)
    live = exists().where(ItemRow.segment_id == SegmentRow.id, ItemRow.deleted_version.is_(None))
    return list(
        session.scalars(
            select(SegmentRow).where(SegmentRow.gallery_id == gallery_id, live, ~has).order_by(SegmentRow.id)
        )
    )


def older(session: Session, gallery_id: int, models: Collection[int], newer: Collection[int]) -> list[ColumnRow]:
    """A gallery's columns of some models in those segments that searches find by a column of a newer one."""
    return list(session.scalars(_older(select(ColumnRow), gallery_id, [(models, newer)])))


def older_bytes(
    session: Session, gallery_id: int, models_and_newer: Iterable[tuple[Collection[int], Collection[int]]]
) -> int:
    """The bytes of the columns that `older` finds for any of these, and of their indexes; each column counts once."""
    taken = select(func.sum(ColumnRow.bytes + func.coalesce(ColumnRow.index_bytes, 0)))
    return int(session.scalar(_older(taken, gallery_id, models_and_newer)) or 0)


def _older(
    statement: Select[T], gallery_id: int, models_and_newer: Iterable[tuple[Collection[int], Collection[int]]]
) -> Select[T]:
    column = aliased(ColumnRow)
    either = or_(
        *(
            and_(
                ColumnRow.model_id.in_(models),
                exists().where(column.segment_id == ColumnRow.segment_id, column.model_id.in_(newer), column.published),
            )
            for models, newer in models_and_newer
        )
    )
    return statement.join(SegmentRow, SegmentRow.id == ColumnRow.segment_id).where(
        SegmentRow.gallery_id == gallery_id, either
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
