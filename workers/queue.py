"""The one door through which work is announced. A nudge carries nothing but "look": the catalog says what there is to do."""

from __future__ import annotations

import threading
import time

import structlog
from celery import Celery

from gallery.catalog.transaction import in_words
from workers.app import WORK

log = structlog.get_logger()
# A nudge that nobody took for this long is stale: every worker has looked by itself since.
_EXPIRES_SECONDS = 10
# At most one nudge in this time, however often something is written.
_APART_SECONDS = 0.1


class Queue:
    """Sends nudges from a thread of its own, so that no answer is late because a broker hangs."""

    def __init__(self, app: Celery) -> None:
        """Send through `app`."""
        self._app = app
        self._wanted = threading.Event()
        threading.Thread(target=self._run, name="nudge", daemon=True).start()

    def nudge(self) -> None:
        """Tell a worker to look for work. If the broker is down, workers find it by themselves, half a second later."""
        self._wanted.set()

    def _run(self) -> None:
        while self._wanted.wait():
            self._wanted.clear()
            self._send()
            time.sleep(_APART_SECONDS)

    def _send(self) -> None:
        try:
            self._app.send_task(WORK, expires=_EXPIRES_SECONDS, retry=False, ignore_result=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next one may go well
            log.warning("nudge_lost", error=in_words(error))
