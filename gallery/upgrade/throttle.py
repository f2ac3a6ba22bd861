"""How fast an upgrade may go. Pure: decisions over moments, which the catalog carries to every worker.

The throttle is one moment per upgrade, `not_before`: no worker leases a segment earlier. A rate has each segment wait, before it
is leased, for as long as its items take at that rate; a duty cycle has the next wait once one is done. So several workers share
one limit. With it goes the moment at which it was set: that lies in the future only where a clock was set back, and then nobody
knows how long the wait still is.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

SEARCH_P99 = "search_p99_above_limit"
_LONGEST = timedelta(days=3650).total_seconds()  # nobody waits for more, and a moment after the year 9999 is none
_SKEW = timedelta(minutes=1)  # by which the clocks of two hosts may differ
_LATE = timedelta(seconds=1)  # a worker that is late by no more catches up; twice the time between two of its looks
# What a segment takes besides its items: transactions, and files that are synced. With SQLite on two processors: 0.08 to 0.13.
_SEGMENT_SECONDS = 0.1


def believed(not_before: datetime | None, set_at: datetime | None, now: datetime) -> datetime | None:
    """The moment until which an upgrade waits; None if it does not, or if the clock was set back since.

    Args:
        not_before: as the catalog has it.
        set_at: when it was set.
        now: this moment, by the clock of whoever asks.
    """
    return None if set_at is not None and set_at > now + _SKEW else not_before


def is_due(throttle: Mapping[str, Any], not_before: datetime | None) -> bool:
    """Whether the next segment has waited for as long as its items take; if `not_before` is not set, its wait has not begun."""
    return not throttle.get("items_per_second") or not_before is not None


def before_segment(
    throttle: Mapping[str, Any], rows: int | None, not_before: datetime | None, now: datetime
) -> datetime | None:
    """When the next segment, of `rows` rows, may be leased, counted from when this one might have been.

    `rows` is None where none is left: whichever comes next has not waited yet.
    """
    rate = throttle.get("items_per_second")
    if not rate:
        return not_before
    if rows is None:
        return None
    return _since(not_before, now) + _wait(rows / rate)


def after_segment(
    throttle: Mapping[str, Any], seconds: float, not_before: datetime | None, now: datetime
) -> datetime | None:
    """When the next segment may be leased, now that one took `seconds` of work."""
    duty = throttle.get("duty_cycle")
    if not duty or duty >= 1 or not is_due(throttle, not_before):
        return not_before
    began = now - _wait(seconds)
    late = began - min(began, _since(not_before, began))  # it rested for longer than it had to
    return max(not_before or now, now - late + _wait(seconds * (1 / duty - 1)))


def after_change(
    before: Mapping[str, Any], throttle: Mapping[str, Any], rows: int | None, not_before: datetime | None, now: datetime
) -> datetime | None:
    """When the next segment may be leased, now that other limits hold: as soon as by the old ones or by these.

    So a higher limit is felt at once, and nothing waits for ever where limits are changed again and again.
    """
    if all(before.get(name) == throttle.get(name) for name in ("items_per_second", "duty_cycle")):
        return not_before
    anew = before_segment(throttle, rows, None, now)
    return anew if anew is None or not_before is None else min(anew, not_before)


def predicted_seconds(throttle: Mapping[str, Any], items: int, segments: int, rate: float) -> float:
    """How long `items` in so many segments take one worker that is throttled.

    Args:
        throttle: the limits.
        items: how many there are to transform.
        segments: how many hold them.
        rate: items per second, measured at full speed within a segment.
    """
    work = items / rate + segments * _SEGMENT_SECONDS
    return max(work / (throttle.get("duty_cycle") or 1), least_seconds(throttle, items))


def least_seconds(throttle: Mapping[str, Any], items: int) -> float:
    """How long `items` take at the very least: what was done until now may have been done under another limit, or none."""
    limit = throttle.get("items_per_second")
    return items / limit if limit else 0.0


def held_back(
    throttle: Mapping[str, Any], not_before: datetime | None, now: datetime, p99_ms: float | None
) -> tuple[str, str] | None:
    """Why no segment may be leased now, as a reason for programs and a detail for people; None if one may."""
    limit = throttle.get("max_search_p99_ms")
    if limit is not None and p99_ms is not None and p99_ms > limit:
        return SEARCH_P99, f"p99 {p99_ms:.0f} ms > {limit:g} ms: no segment starts until searches are faster"
    if not_before is not None and now < not_before:
        reason = "items_per_second" if throttle.get("items_per_second") else "duty_cycle"
        wait = (not_before - now).total_seconds()
        return reason, f"{reason} is {throttle.get(reason, 1):g}: the next segment starts in {wait:.1f} s"
    return None


def _since(not_before: datetime | None, now: datetime) -> datetime:
    """From when a wait is counted. A worker that is a little late catches up; longer time that passed unused is not saved up."""
    return now if not_before is None else max(not_before, now - _LATE)


def _wait(seconds: float) -> timedelta:
    # In this order, `min` also gives the longest where `seconds` is NaN: 0 by infinity.
    return timedelta(seconds=min(_LONGEST, seconds))
