"""Rows of upgrades and their segments: leases, heartbeats, fencing.

A lease is a promise with an end. Its fence is the real guard: every lease of a segment takes the next number, and only the
holder of the latest may publish, however late it wakes up and whatever the clocks say.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import ColumnElement, Select, and_, func, or_, select, update
from sqlalchemy.orm import Session, lazyload, load_only

from gallery import errors
from gallery.catalog import leases
from gallery.catalog.models import as_transformation, transformation_row
from gallery.catalog.tables import SegmentRow, UpgradeRow, UpgradeSegmentRow
from gallery.spaces import Transformation

_DAY_SECONDS = 86_400.0  # no lease is longer


@dataclass(frozen=True, slots=True)
class Lease:
    """One segment of one upgrade, held by one worker."""

    upgrade_id: str
    segment_id: int
    owner: str
    fence: int
    #: whether the worker may have no other segment under way beside it
    alone: bool = False


class Pins(NamedTuple):
    """What upgrades mean for the searches of a gallery."""

    #: (source, target) -> name of the transformation that searches must use between them
    pinned: Mapping[tuple[str, str], str]
    #: models that a finalized upgrade left behind
    retired: frozenset[str]
    #: names of transformations that are given zeros where side-information is missing
    zeros_for: frozenset[str]


class Counts(NamedTuple):
    """Segments and items of an upgrade by the state of their work."""

    segments: Mapping[str, int]
    items: Mapping[str, int]
    last_done: datetime | None


def upgrade_row(session: Session, upgrade_id: str, *, lock: bool = False, models: bool = True) -> UpgradeRow:
    """The row of an upgrade.

    Args:
        session: of the transaction.
        upgrade_id: which.
        lock: nobody else changes it until the transaction ends.
        models: its models and its transformation are read with it, and not only when they are asked for.

    Raises:
        UpgradeNotFound: none has the id.
    """
    statement = select(UpgradeRow).where(UpgradeRow.id == upgrade_id)
    if not models:
        statement = statement.options(lazyload("*"))
    if lock:
        statement = statement.with_for_update(of=UpgradeRow).execution_options(populate_existing=True)
    row = session.scalar(statement)
    if row is None:
        raise errors.UpgradeNotFound(f"no upgrade has the id {upgrade_id!r}")
    return row


def of_gallery(session: Session, gallery_id: int) -> list[UpgradeRow]:
    """All upgrades of a gallery that were not dry runs, oldest first."""
    return list(
        session.scalars(
            select(UpgradeRow)
            .where(UpgradeRow.gallery_id == gallery_id, ~UpgradeRow.dry_run)
            .order_by(UpgradeRow.created_at, UpgradeRow.id)
        )
    )


def open_of(session: Session, gallery_id: int) -> list[UpgradeRow]:
    """The upgrades of a gallery that can still be undone, each on top of the one before it; only the last may be active."""
    return open_in(session, [gallery_id])[gallery_id]


def open_in(session: Session, galleries: Collection[int]) -> dict[int, list[UpgradeRow]]:
    """As `open_of`, of each of these galleries, by one statement."""
    still_open = or_(UpgradeRow.active, UpgradeRow.state == "completed")
    rows = session.scalars(
        select(UpgradeRow)
        .where(UpgradeRow.gallery_id.in_(galleries), ~UpgradeRow.dry_run, still_open)
        .order_by(UpgradeRow.created_at, UpgradeRow.id)
    ).all()
    return {gallery: _stacked([row for row in rows if row.gallery_id == gallery]) for gallery in galleries}


def _stacked(rows: list[UpgradeRow]) -> list[UpgradeRow]:
    """Open upgrades of a gallery, each after the one that led to the model that it starts at; no clock has a say."""
    starting = {row.source_id: row for row in rows}
    row = next((row for row in rows if row.source_id not in {other.target_id for other in rows}), None)
    found: list[UpgradeRow] = []
    while row is not None:
        found.append(row)
        row = starting.get(row.target_id)
    return found


def stack_of(session: Session, row: UpgradeRow) -> list[UpgradeRow]:
    """The open upgrades of an upgrade's gallery; none where that is deleted."""
    return [] if row.gallery_id is None else open_of(session, row.gallery_id)


def above(row: UpgradeRow, stack: Sequence[UpgradeRow]) -> Sequence[UpgradeRow]:
    """Those of its gallery's open upgrades that started on top of this one."""
    at = next((at for at, other in enumerate(stack) if other.id == row.id), len(stack))
    return stack[at + 1 :]


def finalized_sources(session: Session, gallery_id: int) -> set[int]:
    """The models that finalized upgrades of a gallery started at; it may have come back to one since."""
    sources = select(UpgradeRow.source_id).where(UpgradeRow.gallery_id == gallery_id, UpgradeRow.state == "finalized")
    return set(session.scalars(sources))


def transformations(session: Session, row: UpgradeRow) -> list[Transformation]:
    """What an upgrade is pinned to: by the digests that it was started with, whatever the names stand for now."""
    main = replace(as_transformation(row.transformation), artifact=row.artifact)
    others = [
        replace(as_transformation(transformation_row(session, other["transformation"])), artifact=other["artifact"])
        for other in row.others
    ]
    return [main, *others]


def active_of(session: Session, gallery_id: int) -> UpgradeRow | None:
    """The active upgrade of a gallery."""
    return session.scalar(select(UpgradeRow).where(UpgradeRow.gallery_id == gallery_id, UpgradeRow.active))


def active_in(session: Session, galleries: Collection[int]) -> dict[int, str]:
    """The active upgrade of each of these galleries that has one."""
    active = (UpgradeRow.gallery_id.in_(galleries), UpgradeRow.active)
    rows = session.execute(select(UpgradeRow.gallery_id, UpgradeRow.id).where(*active))
    return {gallery: upgrade for gallery, upgrade in rows if gallery is not None}


def pins(session: Session, gallery_id: int, *, also: str | None = None) -> Pins:
    """Which transformation each pair of models is pinned to, and which models are retired.

    An upgrade pins its transformations once it has passed validation; a dry run never does. With `also`, the answer is what it
    would be if that upgrade had begun too.
    """
    pinned: dict[tuple[str, str], str] = {}
    retired: set[str] = set()
    zeros_for: set[str] = set()
    # Not the measures and reports of every upgrade that the gallery ever had: each write would have all of them read again.
    begun = session.scalars(
        select(UpgradeRow)
        .where(
            UpgradeRow.gallery_id == gallery_id,
            or_(and_(~UpgradeRow.dry_run, UpgradeRow.started_at.is_not(None)), UpgradeRow.id == also),
            UpgradeRow.state.not_in(["cancelled", "rolled_back"]),
        )
        .options(load_only(UpgradeRow.state, UpgradeRow.artifact, UpgradeRow.others, UpgradeRow.missing_side))
        .order_by(UpgradeRow.id == also, UpgradeRow.created_at, UpgradeRow.id)
    )
    for row in begun:
        for each in transformations(session, row):
            pinned[each.source, each.target] = each.name
            if row.missing_side == "zeros":
                zeros_for.add(each.name)
        if row.state == "finalized":
            retired.add(row.source.name)
            retired.discard(row.target.name)
    return Pins(pinned, frozenset(retired), frozenset(zeros_for))


def add_segments(session: Session, upgrade_id: str, segments: Iterable[tuple[int, int]], *, start: int) -> None:
    """Add (segment, rows) to the work of an upgrade, in this order from position `start`."""
    session.add_all(
        UpgradeSegmentRow(upgrade_id=upgrade_id, segment_id=segment, rows=rows, position=start + at)
        for at, (segment, rows) in enumerate(segments)
    )
    session.flush()


def work(session: Session, upgrade: UpgradeRow) -> list[SegmentRow]:
    """The segments of an upgrade, as they are stored."""
    rows = session.scalars(
        select(SegmentRow)
        .join(UpgradeSegmentRow, UpgradeSegmentRow.segment_id == SegmentRow.id)
        .where(UpgradeSegmentRow.upgrade_id == upgrade.id)
        .order_by(SegmentRow.id)
    )
    return list(rows)


def reorder(session: Session, upgrade_id: str, segments: Iterable[int]) -> None:
    """Let the work go on in this order; the caller has locked the upgrade. What arrives later still goes last."""
    places = [{"upgrade_id": upgrade_id, "segment_id": segment, "position": at} for at, segment in enumerate(segments)]
    if places:
        session.execute(update(UpgradeSegmentRow), places)


def lease_upgrade(session: Session, upgrade_id: str, states: Collection[str], *, owner: str, seconds: float) -> bool:
    """Lease an upgrade that is in one of these states, so that one worker judges it; False if it is in another, or is leased."""
    taken = session.execute(
        update(UpgradeRow)
        .where(UpgradeRow.id == upgrade_id, UpgradeRow.state.in_(states), _unattended(session, seconds))
        .values(owner=owner, leased_until=leases.moment(session) + timedelta(seconds=seconds))
        .returning(UpgradeRow.id)
        .execution_options(synchronize_session=False)
    )
    return taken.first() is not None


def renew_upgrade(session: Session, upgrade_id: str, states: Collection[str], *, owner: str, seconds: float) -> bool:
    """Heartbeat: move the end of the lease; False if another worker has it now, or the upgrade came to another state."""
    kept = session.execute(
        update(UpgradeRow)
        .where(UpgradeRow.id == upgrade_id, UpgradeRow.state.in_(states), UpgradeRow.owner == owner)
        .values(leased_until=leases.moment(session) + timedelta(seconds=seconds))
        .returning(UpgradeRow.id)
        .execution_options(synchronize_session=False)
    )
    return kept.first() is not None


def release_upgrade(session: Session, upgrade_id: str, *, owner: str) -> None:
    """End the owner's lease now; without effect where another worker has it. When it ended stays on the row."""
    session.execute(
        update(UpgradeRow)
        .where(UpgradeRow.id == upgrade_id, UpgradeRow.owner == owner)
        .values(owner=None, leased_until=leases.moment(session))
        .execution_options(synchronize_session=False)
    )


def unattended(session: Session, upgrade_id: str, seconds: float) -> bool:
    """Whether no worker has a lease on the upgrade itself; leases are given for `seconds`."""
    free = select(UpgradeRow.id).where(UpgradeRow.id == upgrade_id, _unattended(session, seconds))
    return session.scalar(free) is not None


def worked_at(session: Session, first: str) -> UpgradeRow | None:
    """An upgrade that some worker is at now, which judges it or holds a segment of it: the `first`, else any; None if none is."""
    moment = leases.moment(session)
    segment = select(UpgradeSegmentRow.segment_id).where(
        UpgradeSegmentRow.upgrade_id == UpgradeRow.id,
        UpgradeSegmentRow.state == "leased",
        ~leases.ended(UpgradeSegmentRow.leased_until, moment, _DAY_SECONDS),
    )
    judged = and_(UpgradeRow.owner.is_not(None), ~leases.ended(UpgradeRow.leased_until, moment, _DAY_SECONDS))
    at = select(UpgradeRow).where(UpgradeRow.active, or_(judged, segment.exists()))
    return session.scalar(at.order_by(UpgradeRow.id != first, UpgradeRow.id).limit(1))


def segment_work(session: Session, lease: Lease) -> UpgradeSegmentRow:
    """The row of a leased segment, if the lease still holds.

    Raises:
        LeaseLost: another worker took the segment, or the upgrade's work is gone.
    """
    row = session.scalar(
        select(UpgradeSegmentRow).where(_holding(lease)).with_for_update().execution_options(populate_existing=True)
    )
    if row is None:
        raise errors.LeaseLost(f"segment {lease.segment_id} is no longer held by {lease.owner}")
    return row


def lease_next(
    session: Session, upgrade: UpgradeRow, *, owner: str, seconds: float, max_attempts: int
) -> UpgradeSegmentRow | None:
    """Lease the next segment that is free, or whose holder went silent; the caller has locked the upgrade.

    A segment whose holders died `max_attempts` times is set aside as failed, so that it cannot take down every worker.
    """
    while True:
        row = session.scalar(_next_free(session, upgrade.id, seconds).with_for_update())
        if row is None:
            return None
        row.fence += 1
        if row.attempts >= max_attempts:
            row.state, row.owner, row.leased_until = "failed", None, None
            row.error = row.error or f"its worker died {row.attempts} times"
            session.flush()
            continue
        row.attempts += 1
        row.state, row.owner, row.leased_until = "leased", owner, leases.moment(session) + timedelta(seconds=seconds)
        session.flush()
        return row


def renew(session: Session, lease: Lease, seconds: float) -> bool:
    """Heartbeat: move the end of a lease; False if it is lost."""
    renewed = session.execute(
        update(UpgradeSegmentRow)
        .where(_holding(lease))
        .values(leased_until=leases.moment(session) + timedelta(seconds=seconds))
        .returning(UpgradeSegmentRow.segment_id)
        .execution_options(synchronize_session=False)
    )
    return renewed.first() is not None


def next_free(session: Session, upgrade_id: str, seconds: float = _DAY_SECONDS) -> UpgradeSegmentRow | None:
    """The segment that a worker could lease now, where leases are given for so many seconds."""
    return session.scalar(_next_free(session, upgrade_id, seconds))


def _next_free(session: Session, upgrade_id: str, seconds: float) -> Select[UpgradeSegmentRow]:
    return (
        select(UpgradeSegmentRow)
        .where(UpgradeSegmentRow.upgrade_id == upgrade_id, _free(leases.moment(session), seconds))
        .order_by(UpgradeSegmentRow.position)
        .limit(1)
    )


def counts(session: Session, upgrade_id: str) -> Counts:
    """Count the work of an upgrade from its rows."""
    row = UpgradeSegmentRow
    found = session.execute(
        select(row.state, func.count(), func.sum(row.rows), func.max(row.done_at))
        .where(row.upgrade_id == upgrade_id)
        .group_by(row.state)
    ).all()
    return Counts(
        segments={state: count for state, count, _, _ in found},
        items={state: int(items) for state, _, items, _ in found},
        last_done=max((done_at for *_, done_at in found if done_at is not None), default=None),
    )


def last_done(session: Session, upgrade_id: str, *, before: datetime) -> datetime | None:
    """When a segment of an upgrade was done last before a moment; null if none was."""
    there = (UpgradeSegmentRow.upgrade_id == upgrade_id, UpgradeSegmentRow.done_at < before)
    return session.scalar(select(func.max(UpgradeSegmentRow.done_at)).where(*there))


def items_transformed(session: Session) -> Mapping[str, int]:
    """Items that upgrades transformed, by the name of the gallery. The numbers never fall; a first upgrade begins with 0."""
    rows = session.execute(
        select(UpgradeRow.gallery_name, func.sum(UpgradeRow.items_transformed)).group_by(UpgradeRow.gallery_name)
    )
    return {gallery: int(items) for gallery, items in rows}


def by_state(session: Session) -> Mapping[str, int]:
    """How many upgrades are in each state. Dry runs are left out: one that failed is nothing that an operator has to mend."""
    rows = session.execute(select(UpgradeRow.state, func.count()).where(~UpgradeRow.dry_run).group_by(UpgradeRow.state))
    return dict(rows.all())


def in_state(session: Session, upgrade_id: str, state: str) -> list[UpgradeSegmentRow]:
    """Segments of an upgrade whose work is in a state, in the order of the work."""
    return list(
        session.scalars(
            select(UpgradeSegmentRow)
            .where(UpgradeSegmentRow.upgrade_id == upgrade_id, UpgradeSegmentRow.state == state)
            .order_by(UpgradeSegmentRow.position)
        )
    )


def set_aside(session: Session, upgrade_id: str, segment_id: int, error: str) -> None:
    """Record that a segment's work failed, so that a retry does it again.

    A segment that was upgraded with the request that wrote it had no row of work; it gets one.
    """
    row = session.get(UpgradeSegmentRow, (upgrade_id, segment_id))
    if row is None:
        rows = session.get_one(SegmentRow, segment_id).rows
        row = UpgradeSegmentRow(
            upgrade_id=upgrade_id, segment_id=segment_id, rows=rows, position=segment_id, fence=0, attempts=0
        )
        session.add(row)
    row.state, row.error, row.done_at = "failed", error, None


def failures(session: Session, upgrade_id: str) -> list[UpgradeSegmentRow]:
    """Segments that were set aside."""
    return in_state(session, upgrade_id, "failed")


def _unattended(session: Session, seconds: float) -> ColumnElement[bool]:
    return or_(UpgradeRow.owner.is_(None), leases.ended(UpgradeRow.leased_until, leases.moment(session), seconds))


def _free(moment: datetime, seconds: float) -> ColumnElement[bool]:
    ended = leases.ended(UpgradeSegmentRow.leased_until, moment, seconds)
    return or_(UpgradeSegmentRow.state == "pending", and_(UpgradeSegmentRow.state == "leased", ended))


def _holding(lease: Lease) -> ColumnElement[bool]:
    return and_(
        UpgradeSegmentRow.upgrade_id == lease.upgrade_id,
        UpgradeSegmentRow.segment_id == lease.segment_id,
        UpgradeSegmentRow.state == "leased",
        UpgradeSegmentRow.fence == lease.fence,
    )
