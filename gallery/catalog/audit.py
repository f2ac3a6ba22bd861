"""Rows of events: who did what, when, to what. They are added to, and never changed."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from gallery.catalog.tables import EventRow


def record(
    session: Session,
    action: str,
    *,
    gallery: str | None = None,
    upgrade_id: str | None = None,
    actor: str | None = None,
    **detail: Any,
) -> None:
    """Write an event: the audit trail, and what Server-Sent Events replay."""
    session.add(EventRow(action=action, gallery=gallery, upgrade_id=upgrade_id, actor=actor, detail=detail))


def events_after(session: Session, upgrade_id: str, event_id: int) -> list[EventRow]:
    """Events of an upgrade after one that is known, oldest first."""
    return list(
        session.scalars(
            select(EventRow).where(EventRow.upgrade_id == upgrade_id, EventRow.id > event_id).order_by(EventRow.id)
        )
    )


def newest_event(session: Session, upgrade_id: str) -> int:
    """The id of an upgrade's newest event; 0 where it has none."""
    return session.scalar(select(func.max(EventRow.id)).where(EventRow.upgrade_id == upgrade_id)) or 0


def asked_by(session: Session, upgrade_id: str, state: str) -> str | None:
    """The actor who last brought an upgrade to a state; None if a worker did, or a client without a key."""
    came = (EventRow.upgrade_id == upgrade_id, EventRow.detail["state"].as_string() == state)
    return session.scalar(select(EventRow.actor).where(*came).order_by(EventRow.id.desc()).limit(1))


def states(session: Session, upgrade_id: str) -> list[tuple[datetime, str]]:
    """The states that an upgrade came to, and when, oldest first."""
    came = (EventRow.upgrade_id == upgrade_id, EventRow.action == "upgrade.state")
    rows = session.execute(select(EventRow.at, EventRow.detail["state"].as_string()).where(*came).order_by(EventRow.id))
    return [(at, state) for at, state in rows]
