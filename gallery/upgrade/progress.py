"""How far an upgrade is: counted from rows, so it is true after any crash.

Rows of work are deleted with segments that are merged later, and with the gallery. So the counts at the end are kept apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import dropwhile
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
#: by state, what is missing where no worker has the lease on the upgrade
_NOT_DONE = {
    State.PENDING: "no worker has taken it up",
    State.VALIDATING: "no worker checks it, and whoever did has died or was stopped",
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
        return _running(session, row, upgrade_rows.counts(session, row.id))
    since = max(filter(None, (row.state_since, row.leased_until)))
    if row.state in JUDGED and now() - since > _STALLED_AFTER:
        return _stalled(session, row, since, _NOT_DONE[State(row.state)])
    return []


def _stalled(session: Session, row: UpgradeRow, since: datetime, what: str) -> list[Condition]:
    """For a while nothing of it was done: unless a worker is at it, none runs, or each is at others."""
    at = upgrade_rows.worked_at(session, first=row.id)
    if at is None:
        return [Condition("stalled", since, "no_worker", f"{what}; is one running?")]
    if at.id == row.id:
        return []
    turn = (
        f"a worker is at the upgrade of {at.gallery_name}; this one has its turn after that, or start one more worker"
    )
    return [Condition("stalled", since, "workers_busy", f"{what}: {turn}")]


def _gate(row: UpgradeRow) -> list[Condition]:
    """Below its gate, whether that stops it, or somebody decided to go on."""
    found = gate.closed(row.quality)
    if found is None or not row.active:
        return []
    kind = "gate_closed" if gate.stops(row.quality) else "gate_waived"
    return [Condition(kind, datetime.fromisoformat(found["since"]), found["limit"], found["detail"])]


def _running(session: Session, row: UpgradeRow, counts: Counts) -> list[Condition]:
    last = max(filter(None, (row.state_since, counts.last_done)))
    held = hold(session, row)
    if held is not None:
        return [Condition("throttled", last, *held)]
    if now() - last <= _STALLED_AFTER:
        return []
    waiting = upgrade_rows.next_free(session, row.id) is not None
    what = "segments wait and no worker takes them" if waiting else _NOT_DONE[State.VERIFYING]
    return _stalled(session, row, last, what)


def _eta(session: Session, row: UpgradeRow, counts: Counts, left: int, rate: float | None) -> float | None:
    """Null where nobody knows: before the first segment is done, at rest, and while slow searches or no worker hold it back."""
    if not rate or row.state != State.RUNNING:
        return None
    slowed = _running(session, row, counts)
    if any(each.type == "stalled" or each.reason == throttle.SEARCH_P99 for each in slowed):
        return None
    return max(left / rate, throttle.least_seconds(row.throttle, left))


def _rate(session: Session, row: UpgradeRow, counts: Counts, done: int) -> float | None:
    """Items per second, without the time in which it was paused or had failed."""
    if row.started_at is None or counts.last_done is None or done == 0:
        return None
    rested = _rested(session, row, row.started_at, counts.last_done)
    seconds = (counts.last_done - row.started_at - rested).total_seconds()
    return done / seconds if seconds > 0 else None


def _rested(session: Session, row: UpgradeRow, start: datetime, end: datetime) -> timedelta:
    """How long it was paused or failed between two moments; while a segment was still under way, it did not rest."""
    rested, since = timedelta(0), None
    came = audit.states(session, row.id)
    for at, state in dropwhile(lambda each: each[1] != State.RUNNING, came):  # before that, it had not started
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
