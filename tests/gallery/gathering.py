"""A `Together` of which a test knows what is in it."""

from __future__ import annotations

import threading
from typing import Any

from gallery.together import Together

WAIT = 30  # seconds, after which a test fails


class Watched(Together):
    """Tells when a task takes a lane, and when one waits in a line."""

    def __init__(self, lanes: int) -> None:
        super().__init__(lanes)
        self._leads = threading.Semaphore(0)
        self._waits = threading.Semaphore(0)

    def _enter(self, kind: Any, own: Any) -> bool:
        entered = super()._enter(kind, own)
        (self._leads if entered else self._waits).release()
        return entered

    def one_more_leads(self) -> bool:
        """Wait until another task has found a free lane."""
        return self._leads.acquire(timeout=WAIT)

    def one_more_waits(self) -> bool:
        """Wait until another task waits."""
        return self._waits.acquire(timeout=WAIT)

    @property
    def idle(self) -> bool:
        """Whether every lane was given back."""
        return not self._lines
