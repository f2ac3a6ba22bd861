"""Asking again while the service is away, as when it restarts: what waits for hours can wait a minute more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from forwardfill.errors import ForwardfillError

T = TypeVar("T")

#: longer than a service takes to start; one that stays away longer is not coming back by itself
AWAY_SECONDS = 60.0
AGAIN_SECONDS = 0.5
#: statuses of an overloaded service, of one that stops, and of a proxy before one that is away
_PASSING = frozenset({429, 502, 503, 504})


def passes(error: Exception) -> bool:
    """Whether the same request may succeed if it is sent again."""
    if isinstance(error, ForwardfillError):
        return error.status in _PASSING
    return isinstance(error, httpx.TransportError)


def patiently(ask: Callable[[], T], *, deadline: float = math.inf) -> T:
    """Call `ask` until the service answers; it may be called again and again, so it must change nothing.

    Args:
        ask: sends the request.
        deadline: when to give up, by the monotonic clock.

    Raises:
        TimeoutError: the service is away at the deadline.
        Exception: what `ask` raised, if `passes` says no to it, or if the service stays away.
    """
    last = time.monotonic() + AWAY_SECONDS
    while True:
        try:
            return ask()
        except (httpx.TransportError, ForwardfillError) as error:
            now = time.monotonic()
            if not passes(error) or last <= now < deadline:
                raise
            if now >= deadline:
                raise TimeoutError(f"the service does not answer: {error}") from error
        time.sleep(max(0.0, min(AGAIN_SECONDS, deadline - now)))
