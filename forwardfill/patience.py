"""Patience with a service that is away for a while, as when it starts again: who waits for hours need not mind a minute."""

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
#: of a service that has too much to do, of one that stops, and of a proxy before one that is away
_PASSING = frozenset({429, 502, 503, 504})


def passes(error: Exception) -> bool:
    """Whether what was asked may be answered if it is asked again."""
    if isinstance(error, ForwardfillError):
        return error.status in _PASSING
    return isinstance(error, httpx.TransportError)


def patiently(ask: Callable[[], T], *, deadline: float = math.inf) -> T:
    """What a question that changes nothing is answered; it is asked again while the service is away.

    Args:
        ask: the question.
        deadline: of the monotonic clock.

    Raises:
        TimeoutError: the service is away at the deadline.
        Exception: whatever was raised last, where it does not pass or the service stays away.
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
