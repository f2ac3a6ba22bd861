"""Before a process answers, it reads what another process on the same port has already told clients; nobody waits for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from threading import Lock, Thread

import structlog

from gallery.snapshot import Galleries, World
from service.errors import Unavailable

log = structlog.get_logger()

# A write is seen within this time by every process, whether or not it shares a port with the process that took the write.
MOST_SECONDS = 1.0


class CatchUp:
    """One per process. The catalog is read in a thread of its own, once for all who wait for it.

    The catalog may not answer, or new files may take long to open. Then those who wait go on with what there is, because an
    answer without the latest write is better than none, and those who come later do not wait for that write again.
    """

    def __init__(self, galleries: Galleries) -> None:
        """`galleries` are those of this process."""
        self._galleries = galleries
        self._starting = Lock()
        #: its result is why the reading failed, or None
        self._reading: Future[Exception | None] | None = None

    def world(self) -> World:
        """What is current, with all that clients of this port were told of. It blocks, so not for the event loop."""
        for reading, seconds in self._waits():
            with suppress(TimeoutError):
                reading.result(seconds)
        return self._galleries.current

    async def world_on_the_loop(self) -> World:
        """The same, for the event loop."""
        for reading, seconds in self._waits():
            await asyncio.wait([asyncio.wrap_future(reading)], timeout=seconds)
        return self._galleries.current

    def once_more(self) -> World:
        """What is current after the catalog was read again; not for the event loop.

        Raises:
            Unavailable: the reading took too long.
            Exception: whatever the reading failed with.
        """
        try:
            failed = self._next().result(MOST_SECONDS)
        except TimeoutError:
            raise Unavailable("what other processes wrote could not be read in time; try again") from None
        if failed is not None:
            raise failed
        return self._galleries.current

    def _waits(self) -> Iterator[tuple[Future[Exception | None], float]]:
        """Readings to wait for, each with how long. Two, since one that is under way may have begun before the write."""
        first, until = self._galleries.behind, time.monotonic() + MOST_SECONDS
        for _ in range(2):
            left = until - time.monotonic()
            if self._galleries.behind is None or left <= 0:
                break
            yield self._next(), left
        if first is not None and self._galleries.behind is not None:
            self._galleries.forgo(first)

    def _next(self) -> Future[Exception | None]:
        with self._starting:
            if self._reading is None or self._reading.done():
                reading = Future[Exception | None]()
                reading.set_running_or_notify_cancel()  # whoever stops waiting must not cancel it for the others
                try:
                    Thread(target=self._read, args=(reading,), name="catch-up", daemon=True).start()
                except RuntimeError as error:  # too many threads; the one that watches is there already
                    log.exception("catch_up_failed")
                    reading.set_result(error)
                self._reading = reading
            return self._reading

    def _read(self, reading: Future[Exception | None]) -> None:
        try:
            self._galleries.refresh()
        except Exception as error:  # whatever it is, the thread that watches will try again
            log.exception("catch_up_failed")
            reading.set_result(error)
        else:
            reading.set_result(None)
