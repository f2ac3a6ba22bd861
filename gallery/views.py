"""Segments and their columns, open for reading. Nothing here ever changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import structlog

from gallery.arrays import Mask, Origin, Rows, Stored
from gallery.catalog.tables import ColumnRow, SegmentRow
from gallery.catalog.transaction import in_words
from gallery.columns import Ids, open_column, open_ids
from gallery.files import Files
from gallery.index.base import Index
from gallery.index.registry import backend
from gallery.lineage import Lineage, from_json
from gallery.spaces import EmbeddingModel

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Column:
    """One segment's vectors for one model, open for reading."""

    id: int
    model: str
    origin: Origin
    #: what made it, step by step; empty where it is native
    lineage: Lineage
    vectors: Stored
    index: Index
    #: the file that the index was opened from; None where there is none, or it could not be opened. Where the catalog comes to
    #: name another, the column is opened again
    index_file: str | None
    #: of its index, with what was measured of it
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SegmentView:
    """A segment as one snapshot sees it."""

    id: int
    rows: int
    ids: Ids
    #: the file that the ids were opened from; where the catalog comes to name another, they are opened again
    ids_file: str
    side: Stored | None
    #: by model name; only published columns
    columns: Mapping[str, Column]
    #: (rows,) True where the row is live; None where all are
    selected: Mask | None
    #: live rows
    live: int

    @property
    def side_dimension(self) -> int | None:
        """Width of the side-information, null if there is none."""
        return None if self.side is None else self.side.shape[1]


def open_searchable(files: Files, row: ColumnRow, model: EmbeddingModel, rows: int) -> Column:
    """Open a column and its index, published or not. Where the index cannot be opened, it is searched exactly."""
    vectors = open_column(files.path(row.file), rows=rows, dimension=model.dimension)
    opened = row.index_file
    kind, path = ("flat", None) if opened is None else (row.index_kind, files.path(opened))
    try:
        index = backend(kind).open(vectors, space=model.space, path=path, parameters=row.index_parameters)
    except Exception as error:  # bytes that changed may ask for any memory, or be another kind of index
        if path is None:
            raise
        log.warning(
            "index_left_out", segment=row.segment_id, model=model.name, file=row.index_file, error=in_words(error)
        )
        index, opened = backend("flat").open(vectors, space=model.space, path=None, parameters={}), None
    return Column(row.id, model.name, row.origin, from_json(row.lineage), vectors, index, opened, row.index_parameters)


def open_segment(files: Files, row: SegmentRow, columns: Mapping[str, Column]) -> SegmentView:
    side = None
    if row.side_file is not None and row.side_dimension is not None:
        side = open_column(files.path(row.side_file), rows=row.rows, dimension=row.side_dimension)
    return SegmentView(
        id=row.id,
        rows=row.rows,
        ids=open_ids(files.path(row.ids_file), row.rows),
        ids_file=row.ids_file,
        side=side,
        columns=columns,
        selected=None,
        live=row.rows,
    )


def still_open(files: Files, view: SegmentView, ids_file: str, columns: Mapping[str, Column]) -> SegmentView:
    """The segment as it was seen before, with the ids and columns that it has now; deleted rows stay so."""
    if view.ids_file != ids_file:
        view = replace(view, ids=open_ids(files.path(ids_file), view.rows), ids_file=ids_file)
    same = view.columns.keys() == columns.keys() and all(view.columns[name] is columns[name] for name in columns)
    return view if same else replace(view, columns=columns)


def without(view: SegmentView, deleted: Rows | None) -> SegmentView:
    """The segment with more rows deleted; the mask is copied, since other snapshots hold the old one."""
    if deleted is None:
        return view
    selected = np.ones(view.rows, dtype=np.bool_) if view.selected is None else view.selected.copy()
    selected[deleted] = False
    return replace(view, selected=selected, live=int(np.count_nonzero(selected)))
