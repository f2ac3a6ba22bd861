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
from service.auth import MayAdmin
from service.documents import documented
from service.process import Process, ProcessDep
from service.upgrade_documents import progress_document

router = APIRouter(prefix="/admin/upgrades", tags=["upgrades"])

MEDIA_TYPE = "text/event-stream"
_LOOK_SECONDS = 0.4  # each look at what moves is told, "at least each second": there is room for a slow one
_HEARTBEAT_SECONDS = 15.0
_STATES = {"upgrade.started": State.PENDING, "upgrade.state": None}
_EXAMPLE = 'id: 41\nevent: state\ndata: {"id":"01JD..","state":"running","at":"2026-11-20T19:00:00Z"}\n\n'


@dataclass(frozen=True, slots=True)
class _Look:
    """An upgrade at one moment."""

    events: list[EventRow]
    progress: bytes
    state: State
    over: bool


@dataclass(slots=True)
class _Follower:
    """What one client was told."""

    process: Process
    upgrade_id: str
    #: the last event that was sent
    last_id: int
    told: bytes = b""
    told_at: float = field(default_factory=time.monotonic)

    def look(self) -> _Look:
        """Read what happened since; in a thread, since it asks the database."""
        with self.process.store.catalog.reading() as session:
            row = upgrade_rows.upgrade_row(session, self.upgrade_id)
            counted = progress_document(session, row)
            events = audit.events_after(session, self.upgrade_id, self.last_id)
        if events:
            self.process.galleries.announced()
        return _Look(events, counted.model_dump_json().encode(), State(row.state), _is_over(row))

    def news(self, look: _Look) -> bytes:
        """What the client shall be told now."""
        sent = b"".join(self._event(event) for event in look.events)
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
    last_event_id: Annotated[
        str | None, Header(description="The last `id` that was received; later events are sent.", examples=["41"])
    ] = None,
) -> Response:
    """Follow an upgrade: `state` on each change, `progress` at least once a second while it moves. It ends with the upgrade."""
    seen = _number(last_event_id)
    first = await run_in_threadpool(_Follower(process, upgrade, seen or 0).look)
    if seen is not None and first.over and not first.events:
        return Response(status_code=204)  # a browser would connect again and again, for nothing
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(process, upgrade, request, first, seen), headers=headers, media_type=MEDIA_TYPE)


async def _stream(
    process: Process, upgrade_id: str, request: Request, first: _Look, seen: int | None
) -> AsyncIterator[bytes]:
    follower = _Follower(process, upgrade_id, seen or 0)
    look = first
    if seen is None:
        # A newcomer is told how it stands, not how it came to it.
        follower.last_id = look.events[-1].id if look.events else 0
        at = look.events[-1].at if look.events else None
        yield _message("state", follower.last_id, _state(upgrade_id, {"state": look.state, "at": at}))
        look = _Look([], look.progress, look.state, look.over)
    while True:
        sent = follower.news(look)
        if sent:
            yield sent
        if look.over or process.closing.is_set() or await request.is_disconnected():
            return
        await asyncio.sleep(_LOOK_SECONDS)
        look = await run_in_threadpool(follower.look)


def _is_over(row: UpgradeRow) -> bool:
    """Nothing will change any more."""
    return row.state in TERMINAL or row.gallery_id is None or (row.dry_run and not row.active)


def _number(given: str | None) -> int | None:
    """A last event id that is none of ours is as good as none."""
    return int(given) if given is not None and given.isdecimal() and len(given) < 19 else None


def _state(upgrade_id: str, detail: dict[str, Any]) -> bytes:
    return orjson.dumps({"id": upgrade_id, **detail}, option=orjson.OPT_UTC_Z)


def _message(event: str, event_id: int, data: bytes) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event_id, event.encode(), data)
