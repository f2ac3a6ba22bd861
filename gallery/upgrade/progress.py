"""How far an upgrade is: counted from rows, so it is true after any crash.

Rows of work go with the segments that are merged later, and with the gallery: what they say in the end is kept beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from gallery.catalog import audit
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import UpgradeRow, now
from gallery.catalog.upgrades import Counts
from gallery.upgrade import gate, throttle
from gallery.upgrade.segment import hold
from gallery.upgrade.states import JUDGED, State

_STALLED_AFTER = timedelta(seconds=15)
#: what no worker does, where none holds the upgrade
_NOT_DONE = {
    State.PENDING: "no worker has taken it up",
    State.VALIDATING: "no worker checks it: whoever did has died or was stopped",
    State.VERIFYING: "all is done and no worker verifies it",
}


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts of an upgrade's work."""

    items_total: int
    items_done: int
    segments_total: int
    segments_done: int
    segments_failed: int
    #: of items, 0 to 1
    fraction: float
    #: without the time in which it was paused or had failed; null before the first segment is done
    items_per_second: float | None
    #: null when unknown
    eta_seconds: float | None


@dataclass(frozen=True, slots=True)
class Condition:
    """Why an upgrade does not go at full speed, for a person."""

    type: str
    since: datetime
    reason: str
    detail: str


def progress(session: Session, row: UpgradeRow) -> Progress:
    """Count the work of an upgrade, or tell what was counted when it ended."""
    if row.progress is not None:
        return Progress(**row.progress)
    counts = upgrade_rows.counts(session, row.id)
    total, done = sum(counts.items.values()), counts.items.get("done", 0) + counts.items.get("skipped", 0)
    rate = _rate(session, row, counts, done)
    finished = total == 0 and row.state in (State.COMPLETED, State.FINALIZED)
    return Progress(
        items_total=total,
        items_done=done,
        segments_total=sum(counts.segments.values()),
        segments_done=counts.segments.get("done", 0) + counts.segments.get("skipped", 0),
        segments_failed=counts.segments.get("failed", 0),
        fraction=done / total if total else float(finished),
        items_per_second=rate,
        eta_seconds=_eta(session, row, counts, total - done, rate),
    )


def conditions(session: Session, row: UpgradeRow) -> list[Condition]:
    """Why it does not go at full speed: paused, waiting, throttled, stalled, failed, or below its gate."""
    failed = upgrade_rows.failures(session, row.id) if row.state in (State.RUNNING, State.PAUSED, State.FAILED) else []
    found = [*_stopped(session, row, segments_failed=bool(failed)), *_waiting(session, row)]
    if failed:
        said = failed[0].error or "see .../failures"
        found.append(Condition("segments_failed", row.state_since, "attempts_exhausted", f"{said}; see .../failures"))
    return [*found, *_gate(row)]


def _stopped(session: Session, row: UpgradeRow, *, segments_failed: bool) -> list[Condition]:
    """In a state that lasts until a person does something."""
    since = row.state_since
    if row.state == State.PAUSED:
        if gate.stops(row.quality):
            detail = "its gate closed; resume it with POST .../resume, which goes on in spite of that, or cancel it"
            return [Condition("paused", since, "gate_closed", detail)]
        who = audit.asked_by(session, row.id, State.PAUSED)
        by = f"paused by {who}" if who is not None else "paused as somebody asked for"
        return [Condition("paused", since, "requested", f"{by}; resume it with POST .../resume")]
    if row.state == State.AWAITING_CUTOVER:
        return [Condition("awaiting_cutover", since, "manual_cutover", "let it serve with POST .../cutover")]
    if row.state == State.FAILED:
        return [
            Condition("failed", since, _reason(row, segments_failed=segments_failed), row.error or "see .../failures")
        ]
    return []


def _reason(row: UpgradeRow, *, segments_failed: bool) -> str:
    if segments_failed:
        return "segments_failed"
    if row.started_at is None:
        return "validation_failed"
    return "gate_closed" if gate.stops(row.quality) else "verification_failed"


def _waiting(session: Session, row: UpgradeRow) -> list[Condition]:
    """In a state in which workers have something to do, and do it slowly or not."""
    if row.state == State.RUNNING:
        return _running(session, row)
    since = max(filter(None, (row.state_since, row.leased_until)))
    if row.state in JUDGED and now() - since > _STALLED_AFTER:
        return [Condition("stalled", since, "no_worker", f"{_NOT_DONE[State(row.state)]}; is one running?")]
    return []


def _gate(row: UpgradeRow) -> list[Condition]:
    """Below its gate, whether that stops it, or somebody decided to go on."""
    found = gate.closed(row.quality)
    if found is None or not row.active:
        return []
    kind = "gate_closed" if gate.stops(row.quality) else "gate_waived"
    return [Condition(kind, datetime.fromisoformat(found["since"]), found["limit"], found["detail"])]


def _running(session: Session, row: UpgradeRow) -> list[Condition]:
    counts = upgrade_rows.counts(session, row.id)
    held = hold(session, row)
    if held is not None:
        return [Condition("throttled", _last(row, counts), *held)]
    undone = _undone(session, row, counts)
    return (
        [] if undone is None else [Condition("stalled", _last(row, counts), "no_worker", f"{undone}; is one running?")]
    )


def _last(row: UpgradeRow, counts: Counts) -> datetime:
    """When something was last done for it."""
    return max(filter(None, (row.state_since, counts.last_done)))


def _undone(session: Session, row: UpgradeRow, counts: Counts) -> str | None:
    """What no worker does, of one that runs and is not throttled; None while one does."""
    if now() - _last(row, counts) <= _STALLED_AFTER:
        return None
    if upgrade_rows.next_free(session, row.id) is not None:
        return "segments wait and no worker takes them"
    return None if counts.segments.get("leased") else "all is done and no worker verifies it"


def _eta(session: Session, row: UpgradeRow, counts: Counts, left: int, rate: float | None) -> float | None:
    """Null where nobody knows: before the first segment is done, at rest, and while slow searches or no worker hold it back."""
    if not rate or row.state != State.RUNNING:
        return None
    held = hold(session, row)
    if held is None and _undone(session, row, counts) is not None:
        return None
    if held is not None and held[0] == throttle.SEARCH_P99:
        return None
    return max(left / rate, throttle.least_seconds(row.throttle, left))


def _rate(session: Session, row: UpgradeRow, counts: Counts, done: int) -> float | None:
    """Items per second of the time in which it was to go on: a pause is no work."""
    if row.started_at is None or counts.last_done is None or done == 0:
        return None
    rested = _rested(session, row, row.started_at, counts.last_done)
    seconds = (counts.last_done - row.started_at - rested).total_seconds()
    return done / seconds if seconds > 0 else None


def _rested(session: Session, row: UpgradeRow, start: datetime, end: datetime) -> timedelta:
    """How long it rested between two moments, paused or failed, until it went on; a segment that was under way is no rest."""
    rested, since = timedelta(0), None
    for at, state in audit.states(session, row.id):
        if state != State.RUNNING:
            since = since or at
        elif since is not None and at < end:
            last = upgrade_rows.last_done(session, row.id, before=at)
            rested += max(timedelta(0), at - max(filter(None, (since, start, last))))
            since = None
    return rested


def quality(row: UpgradeRow) -> dict[str, Any]:
    """What was measured with probes: before, now, expected after; null where there is nothing to measure with."""
    told = {name: row.quality.get(name) for name in ("before", "now", "expected_after")}
    refined = row.quality.get("refinement") or {}
    return {**told, "by_progress": row.quality.get("by_progress") or [], "by_refinement": refined.get("points") or []}
