"""Reading the state of what many clients follow once for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from starlette.concurrency import run_in_threadpool

T = TypeVar("T")
_KEPT_SECONDS = 60.0


class Looks(Generic[T]):
    """The latest look at each thing; used from one event loop."""

    def __init__(self) -> None:
        """Start with none."""
        self._latest: dict[str, tuple[float, asyncio.Future[T]]] = {}

    async def recent(self, name: str, seconds: float, look: Callable[[], T]) -> T:
        """The result of a look that began less than `seconds` ago or is under way, else of a new one in a thread."""
        now = time.monotonic()
        began, found = self._latest.get(name, (0.0, None))
        if found is None or (found.done() and now - began >= seconds):
            # One that hangs is kept, so that there is never a second beside it.
            self._latest = {
                each: (start, result)
                for each, (start, result) in self._latest.items()
                if now - start < _KEPT_SECONDS or not result.done()
            }
            found = asyncio.ensure_future(run_in_threadpool(look))
            self._latest[name] = now, found
        return await asyncio.shield(found)  # a client that goes away must not cancel it for the others
