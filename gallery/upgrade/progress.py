"""How far an upgrade is: counted from rows, so it is true after any crash."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import UpgradeRow, now
from gallery.catalog.upgrades import Counts
from gallery.upgrade.segment import hold
from gallery.upgrade.states import State

_STALLED_AFTER = timedelta(seconds=15)


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
    #: since the first segment was done; null before
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
    """Count the work of an upgrade."""
    counts = upgrade_rows.counts(session, row.id)
    total, done = sum(counts.items.values()), counts.items.get("done", 0) + counts.items.get("skipped", 0)
    rate = _rate(row, counts, done)
    finished = total == 0 and row.state in (State.COMPLETED, State.FINALIZED)
    return Progress(
        items_total=total,
        items_done=done,
        segments_total=sum(counts.segments.values()),
        segments_done=counts.segments.get("done", 0) + counts.segments.get("skipped", 0),
        segments_failed=counts.segments.get("failed", 0),
        fraction=done / total if total else float(finished),
        items_per_second=rate,
        eta_seconds=(total - done) / rate if rate and row.state == State.RUNNING else None,
    )


def conditions(session: Session, row: UpgradeRow) -> list[Condition]:
    """Why it does not go at full speed: paused, throttled, stalled, or with failed segments."""
    found: list[Condition] = []
    if row.state == State.PAUSED:
        found.append(Condition("paused", row.state_since, "requested", "resume it with POST .../resume"))
    if row.state == State.AWAITING_CUTOVER:
        found.append(
            Condition("awaiting_cutover", row.state_since, "manual_cutover", "let it serve with POST .../cutover")
        )
    if row.state == State.RUNNING:
        found += _running(session, row)
    failed = upgrade_rows.failures(session, row.id)
    if failed and row.state in (State.RUNNING, State.PAUSED, State.FAILED):
        found.append(
            Condition("segments_failed", row.state_since, "attempts_exhausted", failed[0].error or "see .../failures")
        )
    return found


def _running(session: Session, row: UpgradeRow) -> list[Condition]:
    held = hold(session, row)
    if held is not None:
        return [Condition("throttled", row.state_since, *held)]
    counts = upgrade_rows.counts(session, row.id)
    last = max(filter(None, (row.state_since, counts.last_done)))
    if now() - last > _STALLED_AFTER and upgrade_rows.has_free_segment(session, row.id):
        return [Condition("stalled", last, "no_worker", "segments wait and no worker takes them; is one running?")]
    return []


def _rate(row: UpgradeRow, counts: Counts, done: int) -> float | None:
    """Items per second since the work began."""
    if row.started_at is None or counts.last_done is None or done == 0:
        return None
    seconds = (counts.last_done - row.started_at).total_seconds()
    return done / seconds if seconds > 0 else None


def quality(row: UpgradeRow) -> dict[str, Any]:
    """What was measured with probes: before, now, expected after; null where there is nothing to measure with."""
    return {name: row.quality.get(name) for name in ("before", "now", "expected_after")}
