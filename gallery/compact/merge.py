"""Make one segment of several: read, write, index, publish. Safe to repeat, and safe to lose at any step.

As with an upgrade, everything before `_publish` only makes files that nothing names, and `_publish` is one transaction that
holds the gallery's row. It looks again at the segments that were read: if an upgrade has begun with one of them, or another
worker merged it, nothing is published. An upgrade therefore never waits for a merge.

Upserts and deletes are not held up either: what they marked since the read is marked in the new segment too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import NamedTuple

import structlog

from gallery import errors
from gallery.arrays import Rows, Stored
from gallery.catalog import audit, compactions
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import models as model_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog.compactions import Facts, Look
from gallery.catalog.tables import ColumnRow, GalleryRow, ModelRow, SegmentRow, now
from gallery.catalog.transaction import Transaction
from gallery.columns import open_column, open_ids, verify, write_blocks, write_ids
from gallery.compact.plan import AT_ONCE, Piece, Rule, merges
from gallery.files import Written
from gallery.indexing import Decision, build
from gallery.lineage import from_json
from gallery.spaces import EmbeddingModel
from gallery.store import Store, columns_folder

BLOCK_ROWS = 8192
log = structlog.get_logger()


class _Changed(Exception):
    """A segment changed since it was read, so the files that were written are of no use."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What one merge needs, read at one version."""

    gallery: GalleryRow
    version: int
    facts: dict[int, Facts]
    segments: Sequence[SegmentRow]
    #: of each segment, the rows that were live
    kept: Sequence[Rows]
    #: by model, one column of each segment
    columns: Sequence[tuple[EmbeddingModel, Sequence[ColumnRow]]]

    @property
    def rows(self) -> int:
        """Rows of the new segment."""
        return sum(len(rows) for rows in self.kept)

    def holds(self, found: Mapping[int, Facts]) -> bool:
        """Whether the segments are still what was read."""
        return all(found.get(segment) == then for segment, then in self.facts.items())


class Planned(NamedTuple):
    """What there is to merge in a gallery now."""

    merges: list[tuple[int, ...]]
    #: whether an active upgrade holds segments, so that there may be more to merge once it is over
    held: bool


class _Column(NamedTuple):
    """A durable column of the new segment."""

    like: ColumnRow
    file: Written
    decision: Decision


class _Files(NamedTuple):
    """The durable files of the new segment."""

    ids: Written
    side: Written | None
    columns: Sequence[_Column]

    @property
    def names(self) -> list[str]:
        """All of them."""
        files = [self.ids, *([self.side] if self.side else []), *(column.file for column in self.columns)]
        return [file.name for file in files] + [name for column in self.columns for name in column.decision.files]


def ask(store: Store, gallery: str, *, actor: str | None = None) -> None:
    """Record that all small segments of a gallery shall be merged; a worker does it.

    Raises:
        GalleryNotFound: none has the name.
    """
    with store.catalog.transaction() as tx:
        row = gallery_rows.gallery_row(tx.session, gallery)
        gallery_rows.lock(tx.session, row.id)
        row.compact_asked_at = now()
        audit.record(tx.session, "gallery.compact_asked", gallery=gallery, actor=actor)


def looked(store: Store) -> list[Look]:
    """Every gallery as it is now. While one stays the same, so does what there is to merge in it."""
    with store.catalog.reading() as session:
        return compactions.galleries(session)


def planned(store: Store, look: Look, rule: Rule) -> Planned:
    """The merges that a gallery wants now."""
    if not rule.segments and look.asked_at is None:
        return Planned([], held=False)
    with store.catalog.reading() as session:
        found = compactions.facts(session, look.gallery_id)
        live = compactions.live(session, look.gallery_id)
    pieces = (Piece(f.segment_id, f.rows, live[f.segment_id], f.kind, f.held) for f in found.values())
    everything = rule._replace(everything=rule.everything or look.asked_at is not None)
    return Planned(merges(pieces, everything), any(f.held for f in found.values()))


def answered(store: Store, look: Look) -> None:
    """Record that what an operator asked for is done: nothing is left to merge, now or later."""
    with store.catalog.transaction() as tx:
        compactions.answered(tx.session, look)


def merge(store: Store, gallery_id: int, segments: Sequence[int]) -> bool:
    """Make one segment of these, or none if no row is live; False if they changed meanwhile, and nothing was done.

    Raises:
        Damaged: a file does not have its recorded digest. Its bytes must not get a new digest that says they are right.
    """
    job = _read(store, gallery_id, segments)
    if job is None or (job.rows and len({found.kind for found in job.facts.values()}) > 1):
        return False
    try:
        files = _write(store, job) if job.rows else None
        with store.catalog.transaction("compact") as tx, store.files.unnamed(files.names if files else []):
            _publish(tx, job, files)
    except (_Changed, errors.GalleryNotFound):
        return False
    except (errors.Damaged, FileNotFoundError):
        if not _same(store, job):  # dropped with its gallery, or by a finalized upgrade
            return False
        raise
    log.info("compacted", gallery=job.gallery.name, segments=len(segments), rows=job.rows)
    return True


def reclaimable(store: Store, seconds: float) -> bool:
    """Whether segments have been retired for longer than `seconds`."""
    with store.catalog.reading() as session:
        return bool(compactions.retired_before(session, now() - timedelta(seconds=seconds)))


def reclaim(store: Store, seconds: float) -> int:
    """Remove the rows and files of segments that were retired more than `seconds` ago; returns their number.

    A process looks for newer versions several times a second, so by then no search can still be under way that began on a
    snapshot with them. Whoever has the files mapped keeps their bytes in any case.
    """
    with store.catalog.reading() as session:
        retired = compactions.retired_before(session, now() - timedelta(seconds=seconds))
    for gallery_id, segments in retired.items():
        for start in range(0, len(segments), AT_ONCE):
            _remove(store, gallery_id, segments[start : start + AT_ONCE])
    return sum(len(segments) for segments in retired.values())


def _remove(store: Store, gallery_id: int, segments: Sequence[int]) -> None:
    with store.catalog.transaction() as tx:
        names = compactions.remove(tx.session, gallery_id, segments)
        tx.after.append(lambda: store.files.remove(names))


def _read(store: Store, gallery_id: int, segments: Sequence[int]) -> _Job | None:
    with store.catalog.reading() as session:
        gallery = session.get(GalleryRow, gallery_id)
        found = compactions.facts(session, gallery_id)
        if gallery is None or not all(segment in found and not found[segment].held for segment in segments):
            return None
        rows = compactions.segments(session, segments)
        columns = compactions.columns(session, segments)
        return _Job(
            gallery=gallery,
            version=gallery.version,
            facts={segment: found[segment] for segment in segments},
            segments=rows,
            kept=compactions.live_rows(session, rows),
            columns=[
                (model_rows.as_model(session.get_one(ModelRow, model)), of_model) for model, of_model in columns.items()
            ],
        )


def _same(store: Store, job: _Job) -> bool:
    with store.catalog.reading() as session:
        found = compactions.facts(session, job.gallery.id)
    return job.holds(found)


def _write(store: Store, job: _Job) -> _Files:
    _verify(store, job)
    folder = columns_folder(job.gallery.id)
    return _Files(
        ids=write_ids(store.files, folder, list(_ids(store, job))),
        side=_side(store, job),
        columns=[_column(store, job, model, of_model) for model, of_model in job.columns],
    )


def _verify(store: Store, job: _Job) -> None:
    """Compare every digest before anything is written, so that damage leaves no files behind."""
    for segment in job.segments:
        verify(store.files, segment.ids_file, segment.ids_sha256)
        if segment.side_file is not None:
            verify(store.files, segment.side_file, segment.side_sha256 or "")
    for _, of_model in job.columns:
        for column in of_model:
            verify(store.files, column.file, column.sha256)


def _ids(store: Store, job: _Job) -> Iterator[str]:
    for segment, kept in zip(job.segments, job.kept, strict=True):
        ids = open_ids(store.files.path(segment.ids_file), segment.rows)
        yield from (ids[row] for row in kept.tolist())


def _side(store: Store, job: _Job) -> Written | None:
    sides = [segment.side_file for segment in job.segments if segment.side_file is not None]
    dimension = job.segments[0].side_dimension
    if not sides or dimension is None:
        return None
    return _concatenated(store, job, sides, dimension)


def _column(store: Store, job: _Job, model: EmbeddingModel, of_model: Sequence[ColumnRow]) -> _Column:
    file = _concatenated(store, job, [column.file for column in of_model], model.dimension)
    vectors = open_column(store.files.path(file.name), rows=job.rows, dimension=model.dimension)
    return _Column(of_model[0], file, build(store, job.gallery, vectors, model))


def _concatenated(store: Store, job: _Job, sources: Sequence[str], dimension: int) -> Written:
    """One column of what is kept of several, bit for bit as it is stored."""
    blocks = chain.from_iterable(
        _kept(open_column(store.files.path(source), rows=segment.rows, dimension=dimension), kept)
        for source, segment, kept in zip(sources, job.segments, job.kept, strict=True)
    )
    folder, dtype = columns_folder(job.gallery.id), job.gallery.storage_dtype
    return write_blocks(store.files, folder, blocks, rows=job.rows, dimension=dimension, dtype=dtype)


def _kept(column: Stored, kept: Rows) -> Iterator[Stored]:
    for start in range(0, len(kept), BLOCK_ROWS):
        yield column[kept[start : start + BLOCK_ROWS]]


def _publish(tx: Transaction, job: _Job, files: _Files | None) -> None:
    """Name the files and let them take the place of the segments that were read."""
    session, old = tx.session, list(job.facts)
    version = gallery_rows.bump(session, job.gallery.id)
    found = compactions.facts(session, job.gallery.id)
    # Only deletions may have happened since the read; they are carried over.
    if not job.holds(found):
        raise _Changed
    if files is None:
        compactions.mark_moved(session, old, version)
    else:
        segment = segment_rows.add_segment(
            session,
            gallery_id=job.gallery.id,
            version=version,
            rows=job.rows,
            ids=files.ids,
            side=files.side,
            side_dimension=job.segments[0].side_dimension,
        )
        segment.hits = sum(row.hits for row in compactions.segments(session, old))
        for column in files.columns:
            _add_column(tx, segment, column)
        moved, segment.dead = compactions.move_items(session, old, segment.id, read_at=job.version, version=version)
        if moved != job.rows:
            raise errors.Damaged(f"segments {old} had {job.rows} live rows, but the catalog has items for {moved}")
    compactions.retire(session, old)


def _add_column(tx: Transaction, segment: SegmentRow, column: _Column) -> None:
    like = column.like
    added = segment_rows.add_column(
        tx.session,
        segment_id=segment.id,
        model_id=like.model_id,
        written=column.file,
        dtype=like.dtype,
        origin=like.origin,
        published=like.published,
        transformation_id=like.transformation_id,
        upgrade_id=like.upgrade_id,
        lineage=from_json(like.lineage),
    )
    column.decision.record(added)
