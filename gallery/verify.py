"""Whether what the catalog says is so: every digest, and item by item that id, row and vectors belong together.

Never by counts: two errors that cancel out would not be found. It reads beside everything else that goes on, and takes back
what it found wrong with a file or a segment that is gone by then.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Result, func, select
from sqlalchemy.orm import Session

from gallery import errors
from gallery.arrays import Stored
from gallery.catalog import models as model_rows
from gallery.catalog.galleries import gallery_row, known_file
from gallery.catalog.tables import (
    ArtifactRow,
    ColumnRow,
    GalleryRow,
    ItemRow,
    ModelRow,
    SegmentRow,
    TransformationRow,
)
from gallery.catalog.transaction import Catalog, in_words
from gallery.columns import blocks, open_column, open_ids, verify
from gallery.files import Files
from gallery.index.registry import backend
from gallery.index.scores import unit
from gallery.spaces import EmbeddingModel
from gallery.transforms import artifact_file

_BLOCK_ROWS = 8192
_LIVE = -1  # in place of a version
_SAMPLE = 16  # rows of a column that its index is asked for
_K = 10
_AGREES = 0.5  # an index of these vectors finds nearly all of the true neighbours, one of others next to none


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as the catalog says."""

    what: str
    segment: int | None = None
    file: str | None = None
    #: the file's bytes are not what they should be, so that `gallery.repair` may make others
    damaged: bool = False
    #: its deleted rows are counted wrong, so that `gallery.repair` may count them anew
    miscounted: bool = False


@dataclass(slots=True)
class Report:
    """What was looked at, and what is wrong."""

    segments: int = 0
    items: int = 0
    files: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


class _Items:
    """The items of a segment, in the order of their rows; in arrays, since as many objects of Python take seven times as much."""

    def __init__(self, found: Result[int, str, int | None]) -> None:
        """`found` are rows with ids and deletion marks."""
        rows, marks, ends, self._text = array("q"), array("q"), array("q", [0]), bytearray()
        for row, item, deleted in found:
            rows.append(row)
            marks.append(_LIVE if deleted is None else deleted)
            self._text += item.encode()
            ends.append(len(self._text))
        #: (items,) int64 each
        self.rows, self.deleted = np.asarray(rows), np.asarray(marks)
        self.live = int((self.deleted == _LIVE).sum())
        self._ends = ends

    def id(self, at: int) -> str:
        """The id of the item at a place among them."""
        return self._text[self._ends[at] : self._ends[at + 1]].decode()


@dataclass(frozen=True, slots=True)
class _Segment:
    """A segment as one transaction saw it."""

    row: SegmentRow
    gallery_version: int
    columns: Sequence[tuple[ColumnRow, EmbeddingModel, int | None]]
    items: _Items


def names(catalog: Catalog) -> list[str]:
    """The galleries that there are."""
    with catalog.reading() as session:
        return list(session.scalars(select(GalleryRow.name).order_by(GalleryRow.name)))


def gallery(catalog: Catalog, files: Files, name: str, *, step: Callable[[float], None] = lambda _: None) -> Report:
    """Look at everything that a gallery holds; `step` is told the part of it that was done with each segment.

    Raises:
        GalleryNotFound: none has the name.
    """
    report = Report()
    with catalog.reading() as session:
        gallery_id = gallery_row(session, name).id
        ids = session.scalars(select(SegmentRow.id).where(SegmentRow.gallery_id == gallery_id).order_by(SegmentRow.id))
        segments = list(ids)
        problems = list(_live_twice(session, gallery_id))
    for at, segment_id in enumerate(segments):
        with catalog.reading() as session:
            segment = _read(session, gallery_id, segment_id)
        if segment is not None:
            _count(report, segment)
            problems += _segment(files, segment)
        step((at + 1) / len(segments))
    report.problems += [problem for problem in problems if _still(catalog, problem)]
    return report


def artifacts(catalog: Catalog, files: Files) -> Report:
    """Look at every artifact."""
    report = Report()
    with catalog.reading() as session:
        rows = list(session.scalars(select(ArtifactRow).order_by(ArtifactRow.sha256)))
    for row in rows:
        report.files, report.bytes = report.files + 1, report.bytes + row.bytes
        report.problems += _digest(files, artifact_file(row.sha256), row.sha256, None)
    return report


def _read(session: Session, gallery_id: int, segment_id: int) -> _Segment | None:
    row, version = session.get(SegmentRow, segment_id), session.get(GalleryRow, gallery_id)
    if row is None or version is None:
        return None
    columns = session.execute(
        select(ColumnRow, ModelRow, TransformationRow.target_id)
        .join(ModelRow, ModelRow.id == ColumnRow.model_id)
        .outerjoin(TransformationRow, TransformationRow.id == ColumnRow.transformation_id)
        .where(ColumnRow.segment_id == segment_id)
        .order_by(ColumnRow.id)
    )
    items = session.execute(
        select(ItemRow.row, ItemRow.item_id, ItemRow.deleted_version)
        .where(ItemRow.segment_id == segment_id)
        .order_by(ItemRow.row)
        .execution_options(yield_per=_BLOCK_ROWS)
    )
    return _Segment(
        row=row,
        gallery_version=version.version,
        columns=[(column, model_rows.as_model(model), target) for column, model, target in columns],
        items=_Items(items),
    )


def _count(report: Report, segment: _Segment) -> None:
    row = segment.row
    sizes = [row.ids_bytes, row.side_bytes, *(size for c, _, _ in segment.columns for size in (c.bytes, c.index_bytes))]
    present = [size for size in sizes if size is not None]
    report.segments += row.retired_at is None
    report.items += segment.items.live
    report.files += len(present)
    report.bytes += sum(present)


def _segment(files: Files, segment: _Segment) -> Iterator[Problem]:
    """Digests of all its files; and, unless another segment took its place, what they say."""
    row = segment.row
    damaged = list(_digests(files, segment))
    yield from damaged
    wrong = {problem.file for problem in damaged}
    yield from _marks(segment)
    if row.retired_at is not None:
        return
    if row.ids_file not in wrong:
        yield from _ids(files, segment)
    if row.side_file is not None and row.side_dimension is not None and row.side_file not in wrong:
        yield from _vectors(files, row, row.side_file, row.side_dimension)
    for column, model, target in segment.columns:
        yield from _lineage(column, model, target)
        if column.file not in wrong:
            # An upsert refuses a vector of zeros where it has no direction; a transformation may give one, which scores 0.
            zeros = model.metric != "cosine" or column.origin == "derived"
            yield from _vectors(files, row, column.file, model.dimension, zeros=zeros)
            if column.index_file is not None and column.index_file not in wrong:
                yield from _index(files, row, column, model)
    if not any(column.published for column, _, _ in segment.columns) and segment.items.live:
        yield Problem("has live items and no column that a search may use", row.id)


def _digests(files: Files, segment: _Segment) -> Iterator[Problem]:
    row = segment.row
    named = [(row.ids_file, row.ids_sha256), (row.side_file, row.side_sha256)]
    for column, _, _ in segment.columns:
        named += [(column.file, column.sha256), (column.index_file, column.index_sha256)]
    for name, sha256 in named:
        if name is not None:
            yield from _digest(files, name, sha256 or "", row.id)


def _digest(files: Files, name: str, sha256: str, segment: int | None) -> Iterator[Problem]:
    try:
        verify(files, name, sha256)
    except errors.Damaged as error:
        yield Problem(str(error), segment, name, damaged=True)
    except OSError as error:  # as where another user owns it: that says nothing of its bytes
        yield Problem(f"cannot be read: {in_words(error)}", segment, name)


def _marks(segment: _Segment) -> Iterator[Problem]:
    """A deletion is neither older than the row nor newer than the gallery, and counted; what was replaced has no live row."""
    row, items = segment.row, segment.items
    live = items.deleted == _LIVE
    misdated = ~live & ((items.deleted < row.version) | (items.deleted > segment.gallery_version))
    for at in np.flatnonzero(misdated).tolist():
        yield Problem(
            f"row {items.rows[at]} ({items.id(at)!r}) is said to be deleted in version {items.deleted[at]}, but it was written "
            f"in {row.version} and the gallery is at {segment.gallery_version}",
            row.id,
        )
    if row.retired_at is not None:
        for at in np.flatnonzero(live).tolist():
            yield Problem(
                f"row {items.rows[at]} ({items.id(at)!r}) is live although another segment took the place of this one",
                row.id,
            )
    marked = len(items.rows) - items.live
    if marked != row.dead:
        yield Problem(f"{row.dead} of its rows are said to be deleted, and {marked} are", row.id, miscounted=True)


def _ids(files: Files, segment: _Segment) -> Iterator[Problem]:
    """Each row's id in the file is the id of its item in the catalog, and neither has a row that the other has not."""
    row = segment.row
    try:
        ids = open_ids(files.path(row.ids_file), row.rows)
    except (errors.Damaged, FileNotFoundError) as error:
        yield Problem(str(error), row.id, row.ids_file)
        return
    items = segment.items
    inside = (items.rows >= 0) & (items.rows < row.rows)
    places = np.full(row.rows, -1)
    places[items.rows[inside]] = np.flatnonzero(inside)
    for number, at in enumerate(places):
        if at < 0:
            yield Problem(f"row {number} ({ids[number]!r}) has no item in the catalog", row.id, row.ids_file)
        elif items.id(at) != ids[number]:
            yield Problem(
                f"row {number} is {items.id(at)!r} in the catalog and {ids[number]!r} in the file", row.id, row.ids_file
            )
    for at in np.flatnonzero(~inside).tolist():
        yield Problem(f"item {items.id(at)!r} is in row {items.rows[at]} of {row.rows}", row.id, row.ids_file)


def _lineage(column: ColumnRow, model: EmbeddingModel, target: int | None) -> Iterator[Problem]:
    """A native column has no transformation, a derived one has one that leads to its model, and says what it came from."""
    if target != (model.id if column.origin == "derived" else None):
        yield Problem(
            f"is {column.origin} in {model.name}, which its transformation denies", column.segment_id, column.file
        )
    elif bool(column.lineage) != (column.origin == "derived"):
        yield Problem(f"is {column.origin} in {model.name}, which its lineage denies", column.segment_id, column.file)


def _vectors(files: Files, row: SegmentRow, name: str, dimension: int, *, zeros: bool = True) -> Iterator[Problem]:
    """Every row has a vector of the right width that a search can compare; `zeros` says whether one of zeros can be."""
    try:
        vectors = open_column(files.path(name), rows=row.rows, dimension=dimension)
    except (errors.Damaged, FileNotFoundError) as error:
        yield Problem(str(error), row.id, name)
        return
    for start, block in zip(range(0, row.rows, _BLOCK_ROWS), blocks(vectors, _BLOCK_ROWS), strict=True):
        bad = ~np.isfinite(block).all(axis=1)
        if not zeros:
            bad |= ~block.any(axis=1)
        for at in np.flatnonzero(bad).tolist():
            yield Problem(f"the vector of row {start + at} cannot be compared with any", row.id, name)


def _index(files: Files, row: SegmentRow, column: ColumnRow, model: EmbeddingModel) -> Iterator[Problem]:
    """The index finds the neighbours of some of the column's own vectors that an exact search finds."""
    name = column.index_file or ""
    try:
        vectors = open_column(files.path(column.file), rows=row.rows, dimension=model.dimension)
    except (errors.Damaged, FileNotFoundError) as error:
        yield Problem(str(error), row.id, column.file)
        return
    try:
        found = _nearest(column.index_kind, vectors, model, files, column)
    except (
        FileNotFoundError,
        ValueError,
        RuntimeError,
        MemoryError,
        AttributeError,
    ) as error:  # the last where it is another kind of index now
        yield Problem(f"cannot be opened: {error}", row.id, name, damaged=True)
        return
    exact = _nearest("flat", vectors, model, files, None)
    agree = np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)])
    if agree < _AGREES:
        yield Problem(f"finds {agree:.0%} of the neighbours in its column", row.id, name, damaged=True)


def _nearest(kind: str, vectors: Stored, model: EmbeddingModel, files: Files, column: ColumnRow | None) -> NDArray[Any]:
    """The rows nearest to a sample of the vectors, (sample, k)."""
    path = files.path(column.index_file) if column is not None and column.index_file is not None else None
    index = backend(kind).open(
        vectors, space=model.space, path=path, parameters=column.index_parameters if column is not None else {}
    )
    sample = np.unique(np.linspace(0, len(vectors) - 1, _SAMPLE).astype(np.int64))
    queries = np.ascontiguousarray(vectors[sample], dtype=np.float32)
    queries = unit(queries) if model.metric == "cosine" else queries
    return index.search(queries, min(_K, len(vectors))).rows


def _live_twice(session: Session, gallery_id: int) -> Iterator[Problem]:
    """The database forbids it; but an index of it may be damaged, too."""
    twice = (
        select(ItemRow.item_id, func.min(ItemRow.segment_id))
        .where(ItemRow.gallery_id == gallery_id, ItemRow.deleted_version.is_(None))
        .group_by(ItemRow.item_id)
        .having(func.count() > 1)
    )
    for item, segment in session.execute(twice):
        yield Problem(f"{item!r} is live more than once", segment)


def _still(catalog: Catalog, problem: Problem) -> bool:
    """Whether what it is about is still there."""
    with catalog.reading() as session:
        if problem.file is not None:
            return known_file(session)(problem.file)
        return problem.segment is None or session.get(SegmentRow, problem.segment) is not None
