"""Before it answers, a process catches up with what clients of its port were told by another; nobody waits for long."""

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

# Within which a write is seen by every process, whether or not it shares a port with the one that took it.
MOST_SECONDS = 1.0


class CatchUp:
    """One per process. The catalog is read in a thread of its own, once for all who wait for it.

    It may not answer, or what it tells of may take long to open: then whoever waits goes on with what there is, for an answer
    that lacks the latest write is better than none. Those who come after do not wait for the same again.
    """

    def __init__(self, galleries: Galleries) -> None:
        """For the galleries of this process."""
        self._galleries = galleries
        self._starting = Lock()
        #: gives why it failed, if it did
        self._reading: Future[Exception | None] | None = None

    def world(self) -> World:
        """What is current, with all that clients of this port were told of; not for the event loop."""
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
            Unavailable: that takes too long to say what there is.
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
        """What to wait for, and how long: a reading that is under way may have begun too early, the next has not."""
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
