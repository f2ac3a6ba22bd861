"""The audit trail: who did what, when, to what, and with which artifact."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from sqlalchemy import select

from gallery.catalog.tables import EventRow
from service.auth import MayAdmin
from service.bodies import Reference
from service.documents import documented
from service.paging import PageDep, fetch
from service.process import ProcessDep, RequestSlot

router = APIRouter(prefix="/admin/events", tags=["operations"])


class Event(BaseModel):
    """Something that happened. It is never changed and never removed."""

    id: int
    at: datetime
    actor: str | None = Field(
        description="The name of the key that asked for it; null where nobody did: a worker, or a client without a key."
    )
    action: str = Field(description="Such as `upgrade.started`, `upgrade.state`, `column.repaired`, `gallery.deleted`.")
    gallery: str | None
    upgrade: str | None
    detail: dict[str, Any] = Field(
        description="Details: the `state` that an upgrade came to, the `artifact` by its SHA-256, ..."
    )


class Events(BaseModel):
    """A page of events, the newest first."""

    events: list[Event]
    next_page_token: str | None


@router.get("", **documented())
def list_events(
    _: MayAdmin,
    __: RequestSlot,
    page: PageDep,
    process: ProcessDep,
    gallery: Annotated[Reference | None, Query(description="Only events of the gallery with this name.")] = None,
    upgrade: Annotated[Reference | None, Query(description="Only events of this upgrade.")] = None,
) -> Events:
    """List what happened, the newest first. Events of deleted galleries and of past upgrades are kept."""
    statement = select(EventRow)
    if gallery is not None:
        statement = statement.where(EventRow.gallery == gallery)
    if upgrade is not None:
        statement = statement.where(EventRow.upgrade_id == upgrade)
    with process.store.catalog.reading() as session:
        rows, after = fetch(session, statement, EventRow.id, page, newest=True)
    return Events(events=[_event(row) for row in rows], next_page_token=after)


def _event(row: EventRow) -> Event:
    return Event(
        id=row.id,
        at=row.at,
        actor=row.actor,
        action=row.action,
        gallery=row.gallery,
        upgrade=row.upgrade_id,
        detail={name: value for name, value in row.detail.items() if value is not None},
    )
