"""An upgrade as Server-Sent Events: its states from the rows of the audit trail, its progress as it moves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from gallery import errors
from gallery.catalog import audit
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import EventRow, UpgradeRow
from gallery.upgrade.states import DRIVEN, TERMINAL, State
from service import auth, keys
from service.auth import MayAdmin
from service.documents import documented
from service.errors import Forbidden, Unauthenticated
from service.process import Process, ProcessDep, StreamSlot
from service.upgrade_documents import progress_document

router = APIRouter(prefix="/admin/upgrades", tags=["upgrades"])

MEDIA_TYPE = "text/event-stream"
_LOOK_SECONDS = 0.4  # progress is promised at least once a second, which leaves room for a slow look
_HEARTBEAT_SECONDS = 15.0
_STATES = {"upgrade.started": State.PENDING, "upgrade.state": None}
_EXAMPLE = 'id: 41\nevent: state\ndata: {"id":"01JD..","state":"running","at":"2026-11-20T19:00:00Z"}\n\n'


@dataclass(frozen=True, slots=True)
class _Look:
    """An upgrade at one moment."""

    newest_event: int
    progress: bytes
    state: State
    over: bool


def _look(process: Process, upgrade_id: str) -> _Look:
    """Look at an upgrade. It asks the database, so call it in a thread."""
    with process.store.catalog.reading() as session:
        row = upgrade_rows.upgrade_row(session, upgrade_id, models=False)
        counted = progress_document(session, row)
        newest = audit.newest_event(session, upgrade_id)
    return _Look(newest, counted.model_dump_json().encode(), State(row.state), _is_over(row))


@dataclass(slots=True)
class _Follower:
    """What one client was told."""

    process: Process
    upgrade_id: str
    #: the last event that was sent
    last_id: int
    told: bytes = b""
    told_at: float = field(default_factory=time.monotonic)

    async def events(self, look: _Look) -> list[EventRow]:
        """What happened since the last event that was sent; the catalog is read only if something did."""
        return await run_in_threadpool(self._events) if look.newest_event > self.last_id else []

    def _events(self) -> list[EventRow]:
        with self.process.store.catalog.reading() as session:
            events = audit.events_after(session, self.upgrade_id, self.last_id)
        self.process.galleries.announced()
        return events

    def news(self, look: _Look, events: list[EventRow]) -> bytes:
        """What to send to the client now; empty for nothing."""
        sent = b"".join(self._event(event) for event in events)
        if look.progress != self.told or look.state in DRIVEN:
            sent += _message("progress", self.last_id, look.progress)
            self.told = look.progress
        elif not sent and time.monotonic() - self.told_at >= _HEARTBEAT_SECONDS:
            sent = b": still here\n\n"
        if sent:
            self.told_at = time.monotonic()
        return sent

    def _event(self, event: EventRow) -> bytes:
        self.last_id = event.id
        if event.action not in _STATES:
            return b""
        state = _STATES[event.action] or event.detail.get("state")
        told = {**event.detail, "state": state, "at": event.at, "actor": event.actor}
        return _message("state", event.id, _state(self.upgrade_id, told))


@router.get(
    "/{upgrade}/events",
    response_class=StreamingResponse,
    **documented(
        errors.UpgradeNotFound,
        answers={
            200: {
                "description": "Events.",
                "content": {MEDIA_TYPE: {"schema": {"type": "string"}, "example": _EXAMPLE}},
            },
            204: {"description": "The upgrade has ended, and the client has received every event."},
        },
    ),
)
async def follow(
    _: MayAdmin,
    upgrade: str,
    request: Request,
    process: ProcessDep,
    __: StreamSlot,
    last_event_id: Annotated[
        str | None, Header(description="The last `id` that was received; later events are sent.", examples=["41"])
    ] = None,
) -> Response:
    """Follow an upgrade: `state` on each change, `progress` at least once a second while it moves.

    It ends with the upgrade, or when the key is revoked.
    """
    seen = _number(last_event_id)
    # A look of its own, not a shared earlier one: the client must see what the service answered it before.
    look = await run_in_threadpool(_look, process, upgrade)
    # Of earlier events, a client that gives no id needs the last: the time of the latest change.
    follower = _Follower(process, upgrade, max(look.newest_event - 1, 0) if seen is None else seen)
    events = await follower.events(look)
    if seen is not None and look.over and not events:
        return Response(status_code=204)  # else a browser would connect again and again
    if seen is None:
        # Such a client is told the present state, and not how it came about; then every event after this look.
        events = [event for event in events if event.id <= look.newest_event]
        follower.last_id = look.newest_event
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(follower, request, look, events, seen), headers=headers, media_type=MEDIA_TYPE)


async def _stream(
    follower: _Follower, request: Request, look: _Look, events: list[EventRow], seen: int | None
) -> AsyncIterator[bytes]:
    process, upgrade_id = follower.process, follower.upgrade_id
    if seen is None:
        at = events[-1].at if events else None
        yield _message("state", follower.last_id, _state(upgrade_id, {"state": look.state, "at": at}))
        events = []
    while True:
        sent = follower.news(look, events)
        if sent:
            yield sent
        if look.over or process.closing or await request.is_disconnected():
            return
        await asyncio.sleep(_LOOK_SECONDS)
        if not _still_may(process, request):
            return
        # One look for all who follow the upgrade, so that hundreds cost the catalog no more than one.
        look = await process.looks.recent(upgrade_id, _LOOK_SECONDS, lambda: _look(process, upgrade_id))
        events = await follower.events(look)


def _still_may(process: Process, request: Request) -> bool:
    """Whether the client would be let in again: its key may be revoked while an upgrade waits for days."""
    try:
        auth.admitted(process, request.scope, keys.Scope.ADMIN)
    except (Forbidden, Unauthenticated):
        return False
    return True


def _is_over(row: UpgradeRow) -> bool:
    """Nothing will change any more."""
    return row.state in TERMINAL or row.gallery_id is None or (row.dry_run and not row.active)


def _number(given: str | None) -> int | None:
    """The last event id as a number; None also for one that cannot be ours."""
    return int(given) if given is not None and given.isdecimal() and len(given) < 19 else None


def _state(upgrade_id: str, detail: dict[str, Any]) -> bytes:
    return orjson.dumps({"id": upgrade_id, **detail}, option=orjson.OPT_UTC_Z)


def _message(event: str, event_id: int, data: bytes) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event_id, event.encode(), data)
