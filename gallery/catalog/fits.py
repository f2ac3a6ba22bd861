"""Rows of fits: leases, heartbeats, fencing, as for the segments of an upgrade."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from gallery import errors
from gallery.catalog import leases
from gallery.catalog.tables import FitRow, now

PENDING, RUNNING, COMPLETED, FAILED, CANCELLED = "pending", "running", "completed", "failed", "cancelled"


@dataclass(frozen=True, slots=True)
class Lease:
    """One fit, held by one worker; only the holder of the latest fence may end it."""

    fit_id: str
    owner: str
    fence: int


def fit_row(session: Session, fit_id: str, *, lock: bool = False) -> FitRow:
    """The row of a fit; with `lock`, nobody else changes it until the transaction ends.

    Raises:
        FitNotFound: none has the id.
    """
    statement = select(FitRow).where(FitRow.id == fit_id)
    if lock:
        statement = statement.with_for_update(of=FitRow).execution_options(populate_existing=True)
    row = session.scalar(statement)
    if row is None:
        raise errors.FitNotFound(f"no fit has the id {fit_id!r}")
    return row


def wanting(session: Session, name: str) -> str | None:
    """The active fit that will register a transformation of this name."""
    return session.scalar(select(FitRow.id).where(FitRow.name == name, FitRow.active))


def due(session: Session, seconds: float) -> list[str]:
    """Fits that wait, or whose holder went silent, where leases are given for so many seconds; the oldest first."""
    return list(session.scalars(select(FitRow.id).where(_free(session, seconds)).order_by(FitRow.id)))


def lease(session: Session, fit_id: str, *, owner: str, seconds: float) -> FitRow | None:
    """Lease a fit if it is free, and count the attempt; whether that is one too many is for the caller to decide."""
    statement = select(FitRow).where(FitRow.id == fit_id, _free(session, seconds)).with_for_update(of=FitRow)
    row = session.scalar(statement.execution_options(populate_existing=True))
    if row is None:
        return None
    row.fence, row.attempts = row.fence + 1, row.attempts + 1
    row.state, row.owner, row.leased_until = RUNNING, owner, leases.moment(session) + timedelta(seconds=seconds)
    row.started_at = row.started_at or now()
    session.flush()
    return row


def held(session: Session, lease: Lease) -> FitRow:
    """The row of a leased fit, if the lease still holds.

    Raises:
        LeaseLost: another worker took it, or it was cancelled.
    """
    statement = select(FitRow).where(_holding(lease)).with_for_update(of=FitRow)
    row = session.scalar(statement.execution_options(populate_existing=True))
    if row is None:
        raise errors.LeaseLost(f"fit {lease.fit_id} is no longer held by {lease.owner}")
    return row


def renew(session: Session, lease: Lease, seconds: float, told: tuple[float, str] | None = None) -> bool:
    """Heartbeat: move the end of a lease, and record the progress `told` (fraction, method); False if the lease is lost."""
    values = {} if told is None else {"fraction": told[0], "trying": told[1]}
    renewed = session.execute(
        update(FitRow)
        .where(_holding(lease))
        .values(leased_until=leases.moment(session) + timedelta(seconds=seconds), **values)
        .returning(FitRow.id)
        .execution_options(synchronize_session=False)
    )
    return renewed.first() is not None


def release(row: FitRow) -> None:
    """End the lease, so that any worker may begin with the fit again."""
    row.state, row.owner, row.leased_until, row.fraction, row.trying = PENDING, None, None, 0.0, None


def end(row: FitRow, state: str, error: str | None = None) -> list[str]:
    """End a fit in this state; returns the files of its pairs, which no row names any more."""
    names = [name for name in (row.ids_file, row.vectors_file, row.labels_file) if name is not None]
    row.ids_file = row.vectors_file = row.labels_file = None
    row.ids_sha256 = row.vectors_sha256 = row.labels_sha256 = None
    row.state, row.active, row.finished_at, row.error = state, False, now(), error
    row.owner = row.leased_until = row.trying = None
    return names


def names_file(session: Session, name: str) -> bool:
    """Whether an active fit needs a file."""
    named = or_(FitRow.ids_file == name, FitRow.vectors_file == name, FitRow.labels_file == name)
    return session.scalar(select(FitRow.id).where(named).limit(1)) is not None


def _free(session: Session, seconds: float) -> ColumnElement[bool]:
    ended = leases.ended(FitRow.leased_until, leases.moment(session), seconds)
    return or_(FitRow.state == PENDING, and_(FitRow.state == RUNNING, ended))


def _holding(lease: Lease) -> ColumnElement[bool]:
    return and_(FitRow.id == lease.fit_id, FitRow.state == RUNNING, FitRow.fence == lease.fence)
