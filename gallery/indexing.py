"""Give a column its index file: chosen by the gallery's settings, built from the column, durable, recorded.

Large native segments are searched exactly until a worker has come by; an upgrade builds the index before it publishes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import select

from gallery.arrays import Space, Stored
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import models as model_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog.tables import ColumnRow, GalleryRow, ModelRow, SegmentRow
from gallery.columns import open_column
from gallery.files import Written, written
from gallery.index.choose import EXACT, choose
from gallery.index.registry import backend
from gallery.store import Store, indexes_folder


class Built(NamedTuple):
    """An index file that is durable."""

    kind: str
    parameters: dict[str, Any]
    file: Written


def build(store: Store, gallery: GalleryRow, vectors: Stored, space: Space) -> Built | None:
    """Build the index that a column should have; None where it is searched exactly."""
    kind, parameters = choose(gallery.index, rows=len(vectors), exact_below=store.settings.exact_below)
    if kind == EXACT:
        return None
    name = store.files.new(indexes_folder(gallery.id), ".faiss")
    with store.files.writing(name) as path:
        backend(kind).build(vectors, space=space, path=path, parameters=parameters)
    return Built(kind, parameters, written(store.files, name))


def wanting(store: Store, limit: int = 16) -> list[int]:
    """Columns that are large enough for an index and have none."""
    with store.catalog.reading() as session:
        return list(
            session.scalars(
                select(ColumnRow.id)
                .join(SegmentRow)
                .join(GalleryRow)
                .where(
                    ColumnRow.index_file.is_(None),
                    SegmentRow.rows >= store.settings.exact_below,
                    GalleryRow.index["kind"].as_string() != EXACT,
                )
                .order_by(ColumnRow.id)
                .limit(limit)
            )
        )


def index_column(store: Store, column_id: int) -> bool:
    """Build and publish the index of one column; False if it is gone or has one already. Safe to repeat."""
    with store.catalog.reading() as session:
        column = session.get(ColumnRow, column_id)
        if column is None or column.index_file is not None:
            return False
        segment = session.get_one(SegmentRow, column.segment_id)
        gallery = session.get_one(GalleryRow, segment.gallery_id)
        model = model_rows.as_model(session.get_one(ModelRow, column.model_id))
    vectors = open_column(store.files.path(column.file), rows=segment.rows, dimension=model.dimension)
    built = build(store, gallery, vectors, model.space)
    if built is None:
        return False
    with store.catalog.transaction() as tx:
        gallery_rows.bump(tx.session, gallery.id)
        row = tx.session.get(ColumnRow, column_id)
        if row is not None and row.index_file is None:
            segment_rows.set_index(row, built.kind, built.parameters, built.file)
            return True
        tx.after.append(lambda: store.files.remove([built.file.name]))
    return False
