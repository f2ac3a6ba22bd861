"""The one door through which work is announced. A nudge carries nothing but "look": the catalog says what there is to do."""

from __future__ import annotations

import math
import time

import structlog
from celery import Celery
from kombu.exceptions import OperationalError

from workers.app import WORK

log = structlog.get_logger()
# A nudge that nobody took for this long is stale: every worker has looked by itself since.
_EXPIRES_SECONDS = 10
# Whoever writes a hundred times a second need not say so each time: the last of them is found by the worker itself, soon.
_APART_SECONDS = 0.1


class Queue:
    """Sends nudges; safe from many threads."""

    def __init__(self, app: Celery) -> None:
        """Send through `app`."""
        self._app = app
        self._nudged = -math.inf

    def nudge(self) -> None:
        """Tell a worker to look for work. Never raises: if the broker is down, workers find the work by themselves."""
        if time.monotonic() - self._nudged < _APART_SECONDS:
            return
        self._nudged = time.monotonic()
        try:
            self._app.send_task(WORK, expires=_EXPIRES_SECONDS, retry=False, ignore_result=True)
        except (OperationalError, OSError) as error:
            log.warning("nudge_lost", error=repr(error))
