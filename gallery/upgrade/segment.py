"""Upgrade one segment: derive its column, index it, publish both. Safe to repeat, and safe to lose at any step.

Everything before the transaction of `publish` only makes files that nothing names. That one holds the gallery's row and
checks the fence: of two workers that did the same segment, the one that lost its lease names nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from threading import Event

from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery import errors, faults
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import items as item_rows
from gallery.catalog import latencies as latency_rows
from gallery.catalog import models as model_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.segments import made
from gallery.catalog.tables import ColumnRow, GalleryRow, SegmentRow, UpgradeRow, now
from gallery.catalog.upgrades import Lease
from gallery.columns import open_column
from gallery.heartbeat import heartbeat
from gallery.indexing import Decision, build
from gallery.spaces import Transformation
from gallery.store import Store, columns_folder
from gallery.upgrade import pipeline, sources, throttle
from gallery.upgrade.pipeline import Input, Made, Work
from gallery.upgrade.states import PUBLISHING, State


@dataclass(frozen=True, slots=True)
class _Job:
    """What one segment needs, read once."""

    gallery: GalleryRow
    work: Work
    #: what it is made from
    source: ColumnRow


@dataclass(frozen=True, slots=True)
class Derived:
    """A column that is durable, and that nothing names yet."""

    job: _Job
    made: Made
    #: when it was begun, by `time.monotonic`
    begun: float


def lease(store: Store, upgrade_id: str, owner: str) -> Lease | None:
    """Lease the next segment, unless the throttle holds the upgrade back or nothing is left."""
    with store.catalog.transaction("lease") as tx:
        upgrade = upgrade_rows.upgrade_row(tx.session, upgrade_id, lock=True)
        if upgrade.state != State.RUNNING or hold(tx.session, upgrade) is not None:
            return None
        if not throttle.is_due(upgrade.throttle, _waits(upgrade)):
            _await_next(store, tx.session, upgrade)
            return None
        row = upgrade_rows.lease_next(
            tx.session,
            upgrade,
            owner=owner,
            seconds=store.settings.lease_seconds,
            max_attempts=store.settings.max_attempts,
        )
        if row is None:
            return None
        _await_next(store, tx.session, upgrade)
        # Its last worker may have died of it, and another segment beside it would lose an attempt too. And a duty cycle can only
        # be kept if nothing else goes on beside the segment that is timed.
        alone = row.attempts > 1 or upgrade.throttle.get("duty_cycle") is not None
        return Lease(upgrade_id, row.segment_id, owner, row.fence, alone)


def hold(session: Session, upgrade: UpgradeRow) -> tuple[str, str] | None:
    """Why the throttle holds an upgrade back now, if it does."""
    p99 = None
    if upgrade.throttle.get("max_search_p99_ms") is not None:
        p99 = latency_rows.slowest_search_ms(session, upgrade.gallery_id)
    return throttle.held_back(upgrade.throttle, _waits(upgrade), now(), p99)


def due_in(store: Store) -> float | None:
    """Seconds until the first of the waits that hold upgrades back is over; None where nothing waits."""
    moment = now()
    with store.catalog.reading() as session:
        running = session.scalars(select(UpgradeRow).where(UpgradeRow.active, UpgradeRow.state == State.RUNNING))
        waits = [until for row in running if (until := _waits(row)) is not None and until > moment]
    return min((until - moment).total_seconds() for until in waits) if waits else None


def derive(store: Store, held: Lease, read_all: Callable[[], object] = lambda: None) -> Derived | None:
    """Make the column of a leased segment; None if the segment is skipped.

    Args:
        store: where it is.
        held: its lease.
        read_all: is called once all of it is read, before the last block is transformed.

    Raises:
        LeaseLost: another worker has the segment now, or the upgrade no longer wants it; nothing was changed.
    """
    begun = time.monotonic()
    job = _read(store, held)
    if job is None:
        _skip(store, held)
        return None
    faults.reached("read")
    return Derived(job, _made(store, held.segment_id, job.work, read_all), begun)


def _made(store: Store, segment_id: int, work: Work, read_all: Callable[[], object]) -> Made:
    """Make the column. If the vector of a deleted item cannot be stored, the column is made again with a stand-in for it.

    Raises:
        InvalidVector: it gives numbers that cannot be stored for an item that is live; the message names it.
    """
    try:
        return pipeline.derive(store, work, read_all)
    except errors.InvalidVector as error:
        row = error.details["row"]
        with store.catalog.reading() as session:
            deleted, item = item_rows.deleted_rows(session, segment_id), item_rows.id_at(session, segment_id, row)
        if row not in deleted:
            raise errors.InvalidVector(f"item {item!r}: {error}; delete it or store it anew, then retry") from error
        if work.unseen is not None:
            raise
    return _made(store, segment_id, replace(work, unseen=deleted), read_all)


def publish(store: Store, held: Lease, derived: Derived) -> bool:
    """Index a column, and name both; whether it has an index, or one was tried.

    Raises:
        LeaseLost: as for `derive`.
    """
    column, work = derived.made.column, derived.job.work
    vectors = open_column(store.files.path(column.name), rows=work.rows, dimension=work.target.dimension)
    index = build(store, derived.job.gallery, vectors, work.target)
    with store.catalog.transaction("publish") as tx, store.files.unnamed([column.name, *index.files]):
        _publish(tx.session, held, derived, index)
    return index.built is not None or bool(index.refused)


def release(store: Store, held: Lease) -> None:
    """Give a segment back that was not begun or not finished; it does not count as an attempt."""
    with store.catalog.transaction() as tx:
        row = upgrade_rows.segment_work(tx.session, held)
        row.state, row.owner, row.leased_until, row.attempts = "pending", None, None, row.attempts - 1


def fail(store: Store, held: Lease, error: str) -> None:
    """Record that an attempt failed; after the last one the segment is set aside and the rest goes on."""
    with store.catalog.transaction() as tx:
        row = upgrade_rows.segment_work(tx.session, held)
        row.state = "failed" if row.attempts >= store.settings.max_attempts else "pending"
        row.owner, row.leased_until, row.error = None, None, error[:2000]


def renewed(store: Store, held: Lease) -> AbstractContextManager[Event]:
    """Renew a lease while the block runs."""
    seconds = store.settings.lease_seconds
    return heartbeat(store, f"segment {held.segment_id}", lambda session: upgrade_rows.renew(session, held, seconds))


def _read(store: Store, held: Lease) -> _Job | None:
    """What the segment needs; None if it lacks side-information and the upgrade skips such segments, or its items are gone."""
    with store.catalog.reading() as session:
        upgrade = upgrade_rows.upgrade_row(session, held.upgrade_id)
        segment = session.get(SegmentRow, held.segment_id)
        if segment is None or upgrade.gallery_id is None:
            raise errors.LeaseLost(f"segment {held.segment_id} is gone, or its gallery was deleted")
        gallery = session.get_one(GalleryRow, upgrade.gallery_id)
        source = sources.of_segment(session, upgrade, segment)
        target = model_rows.as_model(upgrade.target)
        live = item_rows.any_live(session, segment.id)
    if source is None:
        if upgrade.missing_side == "skip" or not live:
            return None
        raise errors.MissingSideInformation(
            f"segment {segment.id} has no side-information for {upgrade.transformation.name}"
        )
    by = source.transformation
    return _Job(
        gallery,
        Work(
            source=Input(source.column.file, source.column.sha256, source.dimension),
            side=_side(segment, by),
            transformation=by,
            target=target,
            rows=segment.rows,
            folder=columns_folder(gallery.id),
            dtype=gallery.storage_dtype,
        ),
        source.column,
    )


def _side(segment: SegmentRow, by: Transformation) -> Input | None:
    if by.side_dimension is None or segment.side_file is None:
        return None
    return Input(segment.side_file, segment.side_sha256 or "", by.side_dimension)


def _publish(session: Session, held: Lease, derived: Derived, index: Decision) -> None:
    job = derived.job
    gallery_rows.bump(session, job.gallery.id)
    upgrade = _publishing(session, held)
    row = upgrade_rows.segment_work(session, held)
    added: ColumnRow = segment_rows.add_column(
        session,
        segment_id=held.segment_id,
        model_id=job.work.target.id,
        written=derived.made.column,
        dtype=job.work.dtype,
        origin="derived",
        published=upgrade.cutover == "progressive",
        transformation_id=job.work.transformation.id,
        upgrade_id=upgrade.id,
        lineage=made(job.source, job.work.transformation, derived.made.computed_in),
    )
    index.record(added)
    row.state, row.owner, row.leased_until, row.error, row.done_at = "done", None, None, None, now()
    upgrade.items_transformed += row.rows
    seconds = time.monotonic() - derived.begun
    _wait(upgrade, throttle.after_segment(upgrade.throttle, seconds, _waits(upgrade), now()))


def _skip(store: Store, held: Lease) -> None:
    with store.catalog.transaction() as tx:
        _publishing(tx.session, held)
        row = upgrade_rows.segment_work(tx.session, held)
        row.state, row.owner, row.leased_until, row.done_at = "skipped", None, None, now()


def _await_next(store: Store, session: Session, upgrade: UpgradeRow) -> None:
    """Let the next segment wait, from now on, for as long as its items take at the rate of the throttle."""
    following = upgrade_rows.next_free(session, upgrade.id, store.settings.lease_seconds)
    rows = None if following is None else following.rows
    _wait(upgrade, throttle.before_segment(upgrade.throttle, rows, _waits(upgrade), now()))


def _waits(upgrade: UpgradeRow) -> datetime | None:
    return throttle.believed(upgrade.not_before, upgrade.not_before_set_at, now())


def _wait(upgrade: UpgradeRow, until: datetime | None) -> None:
    upgrade.not_before, upgrade.not_before_set_at = until, now()


def _publishing(session: Session, held: Lease) -> UpgradeRow:
    upgrade = upgrade_rows.upgrade_row(session, held.upgrade_id, lock=True)
    if upgrade.state not in PUBLISHING:
        raise errors.LeaseLost(f"the upgrade is {upgrade.state}, so segment {held.segment_id} is not wanted")
    return upgrade
