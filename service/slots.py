"""How many requests run at once, how many may wait, and how much they may hold: overload is refused, never queued without end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.errors import Overloaded


class Slots:
    """A semaphore with a bounded queue; used from one event loop."""

    def __init__(self, concurrent: int, waiting: int) -> None:
        """Let `concurrent` requests in at once, and `waiting` more wait."""
        self._semaphore = asyncio.Semaphore(concurrent)
        self._free = concurrent + waiting

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Hold a slot.

        Raises:
            Overloaded: too many wait already.
        """
        if self._free == 0:
            raise Overloaded("too many requests wait already; try again in a second")
        self._free -= 1
        try:
            async with self._semaphore:
                yield
        finally:
            self._free += 1


class Room:
    """A number of bytes that may be held at once; used from one event loop."""

    def __init__(self, most: int) -> None:
        """Let `most` bytes be held."""
        self._free = most

    def take(self, size: int) -> None:
        """Hold `size` bytes more.

        Raises:
            Overloaded: others hold too many.
        """
        if size > self._free:
            raise Overloaded("the bodies of other requests fill the memory set aside for them; try again in a second")
        self._free -= size

    def give_back(self, size: int) -> None:
        """Hold `size` bytes less."""
        self._free += size
