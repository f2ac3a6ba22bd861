"""Following an upgrade by its events, also through broken streams and a service that starts again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from itertools import takewhile
from typing import Any

import httpx

from forwardfill import wire
from forwardfill.answers import Upgrade
from forwardfill.errors import ForwardfillError, UpgradeStoppedError
from forwardfill.patience import passes, patiently
from forwardfill.session import Session

#: no event comes from an upgrade that is throttled to less than a segment in this time
QUIET_SECONDS = 60.0
RECONNECT_SECONDS = 0.5
#: a wait may last this much longer than was asked for: a stream whose read timeout passes the end by more is opened anew, and
#: the last look gets so long, because a service that is busy answers late
SLACK_SECONDS = 5.0
#: states in which waiting ends. Not `paused` and `awaiting_cutover`: there the upgrade goes on as soon as somebody says so.
RESTING = frozenset({"finalized", "cancelled", "rolled_back", "failed"})
#: where an upgrade that is completed may still go
AFTER_COMPLETED = frozenset({"finalized", "rolling_back", "rolled_back"})


def events(
    session: Session,
    upgrade_id: str,
    after: str | None,
    quiet: float = QUIET_SECONDS,
    go_on: Callable[[], bool] = lambda: True,
) -> Generator[wire.Event, None, None]:
    """Events, while a line comes within `quiet` seconds and `go_on`, called at each line, is true."""
    path, timeout = f"/admin/upgrades/{wire.named(upgrade_id)}/events", httpx.Timeout(quiet, connect=min(5.0, quiet))
    with session.event_stream(path, after, timeout) as lines:
        yield from wire.parse_events(takewhile(lambda _: go_on(), lines))


def reached(session: Session, upgrade_id: str, states: set[str], timeout: float | None) -> Upgrade:
    """The upgrade once it is in one of these states; see `Client.wait`."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    seen: str | None = None

    def read() -> Upgrade:
        left = max(SLACK_SECONDS, deadline - time.monotonic())
        found: Any = session.call("GET", f"/admin/upgrades/{wire.named(upgrade_id)}", at_most=left)
        return found  # type: ignore[no-any-return]

    upgrade = read()
    while upgrade["state"] not in states:
        too_late = upgrade["state"] == "completed" and AFTER_COMPLETED.isdisjoint(states)
        if too_late or upgrade["state"] in RESTING or _gate_paused(upgrade):
            raise UpgradeStoppedError(upgrade)
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"upgrade {upgrade_id} is {upgrade['state']} after {timeout} s")
        seen = _next_state(session, upgrade_id, seen, left)
        upgrade = patiently(read, deadline=deadline)
    return upgrade


def _next_state(session: Session, upgrade_id: str, seen: str | None, left: float) -> str | None:
    """Follow events until one tells another state, the stream ends, or it is time to look, at most `left` seconds from now.

    Returns the id of the last event. An upgrade that rests sends no events, but a comment now and then, which starts the
    read timeout again. So the timeout alone would never end the stream, and the clock is read at every line.
    """
    quiet, deadline = min(QUIET_SECONDS, left), time.monotonic() + left

    def in_time() -> bool:
        return deadline - time.monotonic() > max(0.0, quiet - SLACK_SECONDS)

    try:
        for event in events(session, upgrade_id, seen, quiet, in_time):
            seen = event.id or seen
            if event.name == "state":
                return seen
    except httpx.ReadTimeout:
        return seen
    except (httpx.TransportError, ForwardfillError) as error:
        if not passes(error):
            raise
    if in_time():
        time.sleep(min(RECONNECT_SECONDS, max(0.0, deadline - time.monotonic())))
    return seen


def _gate_paused(upgrade: Upgrade) -> bool:
    """Whether a gate paused the upgrade: only a person can let it go on, and may not know of it yet."""
    return any((each["type"], each["reason"]) == ("paused", "gate_closed") for each in upgrade["conditions"])
