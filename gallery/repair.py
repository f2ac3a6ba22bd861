"""Make anew what was damaged on disk, from what was not.

A derived column is made again from its source by the transformation that its lineage names, ids from the catalog, an index
from its column, and deleted rows are counted again. What came from outside cannot be made here: native vectors,
side-information, artifacts.

As everywhere, nothing is changed in place: the new file is durable before one transaction names it instead of the damaged
one, and a column that is made anew is another column, so that no process goes on with what it has open or mapped of the old.
Until then searches go on with what there is (ADR 0028).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import structlog
from sqlalchemy.orm import Session

from gallery import errors
from gallery import verify as checks
from gallery.arrays import Stored
from gallery.catalog import audit
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import items as item_rows
from gallery.catalog import models as model_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog.tables import ColumnRow, GalleryRow, ModelRow, SegmentRow
from gallery.columns import blocks, open_column, verify, with_stand_ins, write_blocks, write_ids
from gallery.files import Written
from gallery.indexing import index_column
from gallery.lineage import EXACT, Step, from_json
from gallery.spaces import EmbeddingModel, Transformation
from gallery.store import Store, columns_folder
from gallery.verify import Problem, Report

_BLOCK_ROWS = 8192
log = structlog.get_logger()


class Mended(NamedTuple):
    """A file that another took the place of, or a count that was wrong."""

    segment: int
    #: the damaged one
    file: str | None
    #: for people
    what: str


class Outcome(NamedTuple):
    """What was looked at, what is wrong still, and what was made anew."""

    report: Report
    mended: Sequence[Mended]


@dataclass(frozen=True, slots=True)
class _Job:
    """What a derived column is made of."""

    gallery: GalleryRow
    segment: SegmentRow
    column: ColumnRow
    model: EmbeddingModel
    #: the last step of its lineage, as the registry knows it and by the artifact that made the column
    by: Transformation
    source: Stored
    side: Stored | None


def gallery(
    store: Store, name: str, *, actor: str | None = None, step: Callable[[float], None] = lambda _: None
) -> Outcome:
    """Look at everything that a gallery holds, and make anew what is damaged and can be; safe to repeat.

    Args:
        store: where it is.
        name: of the gallery.
        actor: who asked for it, for the audit.
        step: told the part that was looked at.

    Raises:
        GalleryNotFound: none has the name.
    """
    report = checks.gallery(store.catalog, store.files, name, step=step)
    counts = [problem for problem in report.problems if problem.miscounted]
    mended = [done for problem in counts if (done := _count(store, problem.segment, actor)) is not None]
    left = [problem for problem in report.problems if not (problem.damaged or problem.miscounted)]
    for problem in _sources_first(store, [problem for problem in report.problems if problem.damaged]):
        try:
            done = file(store, problem.file or "", actor=actor)
        except (errors.GalleryError, OSError) as error:
            left.append(replace(problem, what=f"{problem.what}; {error}"))
        else:
            mended += [] if done is None else [done]
    report.problems = left
    return Outcome(report, mended)


def attempt(store: Store, error: BaseException) -> bool:
    """Make anew the file that an error names as damaged; whether that was done, so that the caller may try again."""
    name = error.details.get("file") if isinstance(error, errors.Damaged) else None
    if name is None:
        return False
    try:
        file(store, name)
    except Exception as refused:  # noqa: BLE001 - whoever met the damage says so; that it could not be mended is no second error
        log.warning("not_repaired", file=name, error=repr(refused))
        return False
    return True


def file(store: Store, name: str, *, actor: str | None = None) -> Mended | None:
    """Make a damaged file anew; None if no row names it any more, so that nothing is damaged.

    Raises:
        Damaged: it cannot be made from anything that is here; the message says what helps.
    """
    with store.catalog.reading() as session:
        segment, column = segment_rows.naming(session, name)
    if segment is None:
        return None
    if segment.retired_at is not None:
        raise errors.Damaged("another segment took its place already, so it goes by itself")
    try:
        if column is None:
            return _ids(store, segment, name, actor)
        if name == column.index_file:
            return _index(store, column, name, actor)
        return _column(store, column.id, actor)
    except errors.GalleryNotFound:
        return None


def _sources_first(store: Store, problems: Sequence[Problem]) -> list[Problem]:
    """One problem per file: ids, then columns as they were made from each other, then indexes."""
    with store.catalog.reading() as session:

        def rank(problem: Problem) -> int:
            _, column = segment_rows.naming(session, problem.file or "")
            if column is None:
                return -1
            return len(column.lineage) if problem.file == column.file else 1 << 30

        return sorted({problem.file: problem for problem in problems}.values(), key=rank)


# --- a derived column -------------------------------------------------------------------------------------------------


def _column(store: Store, column_id: int, actor: str | None) -> Mended | None:
    job = _read(store, column_id)
    if job is None:
        return None
    written = _transform(store, job)
    with store.catalog.transaction("repair") as tx, store.files.unnamed([written.name]):
        gallery_rows.bump(tx.session, job.gallery.id)
        old = tx.session.get(ColumnRow, column_id, populate_existing=True)
        if old is None:  # rolled back, finalized, or made anew by somebody else
            tx.after.append(lambda: store.files.remove([written.name]))
            return None
        new = _replace(tx.session, old, written)
        damaged = [each for each in (old.file, old.index_file) if each]
        _record(tx.session, job, written, actor)
        tx.after.append(lambda: store.files.remove(damaged))
    index_column(store, new.id)
    otherwise = ", not bit by bit as it was: another machine or number type rounds otherwise"
    same = "" if written.sha256 == job.column.sha256 else otherwise
    return Mended(
        job.segment.id,
        job.column.file,
        f"the {job.model.name} vectors were made anew from {job.by.source} by {job.by.name}{same}",
    )


def _read(store: Store, column_id: int) -> _Job | None:
    """What a derived column was made of, its bytes verified; None where the column is gone.

    Raises:
        Damaged: it is native, its source is gone or damaged too, or so is the artifact.
    """
    with store.catalog.reading() as session:
        column = session.get(ColumnRow, column_id)
        if column is None:
            return None
        segment = session.get_one(SegmentRow, column.segment_id)
        row = session.get_one(GalleryRow, segment.gallery_id)
        model = model_rows.as_model(session.get_one(ModelRow, column.model_id))
        live = item_rows.live_in(session, [segment.id])
        again = f"store its {live} items again, or bring the file back from a backup"
        if not column.lineage:
            raise errors.Damaged(f"{model.name} itself made these vectors, so nothing here can: {again}")
        step = from_json(column.lineage)[-1]
        made_from = segment_rows.columns_of(session, [segment.id])[segment.id].get(step.source)
        if made_from is None:
            raise errors.Damaged(
                f"the {step.source} vectors that it was made from were let go of by a finalize: {again}"
            )
        by = _by(session, step)
        dimension = session.get_one(ModelRow, made_from.model_id).dimension
    verify(store.files, made_from.file, made_from.sha256)
    side = None
    if by.side_dimension is not None and segment.side_file is not None:
        verify(store.files, segment.side_file, segment.side_sha256 or "")
        side = open_column(store.files.path(segment.side_file), rows=segment.rows, dimension=by.side_dimension)
    source = open_column(store.files.path(made_from.file), rows=segment.rows, dimension=dimension)
    return _Job(row, segment, column, model, by, source, side)


def _by(session: Session, step: Step) -> Transformation:
    """The transformation of a step, by the digest that the step names, whatever its name stands for now."""
    return replace(
        model_rows.as_transformation(model_rows.transformation_row(session, step.transformation)),
        artifact=step.artifact,
    )


def _transform(store: Store, job: _Job) -> Written:
    sides = blocks(job.side, _BLOCK_ROWS) if job.side is not None else None
    mapped = (
        store.transforms.apply(job.by, job.model, block, next(sides) if sides else None)
        for block in blocks(job.source, _BLOCK_ROWS)
    )
    dtype = job.column.dtype
    with store.catalog.reading() as session:
        deleted = item_rows.deleted_rows(session, job.segment.id)
    return write_blocks(
        store.files,
        columns_folder(job.gallery.id),
        with_stand_ins(mapped, deleted, dtype),
        rows=job.segment.rows,
        dimension=job.model.dimension,
        dtype=dtype,
    )


def _replace(session: Session, old: ColumnRow, written: Written) -> ColumnRow:
    """Put another column in its place; it is searched exactly until its index is built."""
    lineage = from_json(old.lineage)
    session.delete(old)
    session.flush()
    return segment_rows.add_column(
        session,
        segment_id=old.segment_id,
        model_id=old.model_id,
        written=written,
        dtype=old.dtype,
        origin="derived",
        published=old.published,
        transformation_id=old.transformation_id,
        upgrade_id=old.upgrade_id,
        lineage=(*lineage[:-1], lineage[-1]._replace(computed_in=EXACT)),
    )


def _record(session: Session, job: _Job, written: Written, actor: str | None) -> None:
    """The audit names what made the new bytes, and whether they are the old ones."""
    _event(
        session,
        "column",
        job.gallery.name,
        actor,
        upgrade_id=job.column.upgrade_id,
        segment=job.segment.id,
        file=job.column.file,
        model=job.model.name,
        transformation=job.by.name,
        artifact=job.by.artifact,
        sha256=written.sha256,
        sha256_before=job.column.sha256,
        same=written.sha256 == job.column.sha256,
    )


# --- an index, ids, and a count ---------------------------------------------------------------------------------------


def _index(store: Store, column: ColumnRow, name: str, actor: str | None) -> Mended | None:
    """Drop the index, so that the column is searched exactly, and build another."""
    with store.catalog.transaction("repair") as tx:
        segment = tx.session.get(SegmentRow, column.segment_id)
        if segment is None:
            return None
        gallery_rows.bump(tx.session, segment.gallery_id)
        row = tx.session.get(ColumnRow, column.id, populate_existing=True)
        if row is None or row.index_file != name:
            return None
        segment_rows.drop_index(row)
        known = tx.session.get_one(GalleryRow, segment.gallery_id).name
        _event(tx.session, "index", known, actor, upgrade_id=row.upgrade_id, segment=segment.id, file=name)
        tx.after.append(lambda: store.files.remove([name]))
    index_column(store, column.id)
    with store.catalog.reading() as session:  # a worker may have been quicker
        after = session.get(ColumnRow, column.id)
    built = after is not None and after.index_file is not None
    what = "was built anew from its column" if built else "was let go of, and its column is searched exactly"
    return Mended(column.segment_id, name, f"the index {what}")


def _ids(store: Store, segment: SegmentRow, name: str, actor: str | None) -> Mended | None:
    """Write the ids again from the catalog, which has the row of every item; the bytes must be the same as before.

    Raises:
        Damaged: it is side-information, or the catalog's ids are not those that were written.
    """
    if name == segment.side_file:
        raise errors.Damaged("this side-information came with its items: store them again, or bring the file back")
    with store.catalog.reading() as session:
        ids = item_rows.ids_of(session, segment.id)
    if sorted(ids) != list(range(segment.rows)):
        raise errors.Damaged("the catalog does not have an item for each of its rows")
    written = write_ids(store.files, columns_folder(segment.gallery_id), [ids[row] for row in range(segment.rows)])
    with store.catalog.transaction("repair") as tx, store.files.unnamed([written.name]):
        if written.sha256 != segment.ids_sha256:
            raise errors.Damaged("the ids in the catalog are not those that were written")
        gallery_rows.bump(tx.session, segment.gallery_id)
        row = tx.session.get(SegmentRow, segment.id, populate_existing=True)
        if row is None or row.ids_file != name:
            tx.after.append(lambda: store.files.remove([written.name]))
            return None
        row.ids_file = written.name
        known = tx.session.get_one(GalleryRow, segment.gallery_id).name
        _event(tx.session, "ids", known, actor, segment=segment.id, file=name, sha256=written.sha256)
        tx.after.append(lambda: store.files.remove([name]))
    return Mended(segment.id, name, "the ids were written anew from the catalog")


def _count(store: Store, segment_id: int | None, actor: str | None) -> Mended | None:
    """Count the deleted rows of a segment, while nobody deletes others."""
    with store.catalog.transaction() as tx:
        segment = tx.session.get(SegmentRow, segment_id)
        if segment is None:
            return None
        gallery_rows.bump(tx.session, segment.gallery_id)  # a new version: workers may now find something to merge
        row = tx.session.get(SegmentRow, segment_id, populate_existing=True)
        if row is None:
            return None
        before, row.dead = row.dead, len(item_rows.deleted_rows(tx.session, row.id))
        known = tx.session.get_one(GalleryRow, row.gallery_id).name
        _event(tx.session, "count", known, actor, segment=row.id, dead=row.dead, dead_before=before)
        return Mended(row.id, None, f"its deleted rows are counted anew: {row.dead}")


def _event(session: Session, what: str, gallery: str, actor: str | None, **detail: Any) -> None:
    upgrade_id = detail.pop("upgrade_id", None)
    audit.record(session, f"{what}.repaired", gallery=gallery, upgrade_id=upgrade_id, actor=actor, **detail)
