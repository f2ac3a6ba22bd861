"""What many clients follow is looked at once for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from starlette.concurrency import run_in_threadpool

T = TypeVar("T")
_FORGOTTEN_SECONDS = 60.0


class Looks(Generic[T]):
    """The latest look at each thing; used from one event loop."""

    def __init__(self) -> None:
        """Start with none."""
        self._latest: dict[str, tuple[float, asyncio.Future[T]]] = {}

    async def recent(self, name: str, seconds: float, look: Callable[[], T]) -> T:
        """A look that began less than so many seconds ago, the one that is under way, or a new one, in a thread."""
        now = time.monotonic()
        began, found = self._latest.get(name, (0.0, None))
        if found is None or (found.done() and now - began >= seconds):
            self._latest = {
                each: kept
                for each, kept in self._latest.items()
                if now - kept[0] < _FORGOTTEN_SECONDS
                or not kept[1].done()  # of one that hangs there shall be no second
            }
            found = asyncio.ensure_future(run_in_threadpool(look))
            self._latest[name] = now, found
        return await asyncio.shield(found)  # who goes away must not take it from the others
