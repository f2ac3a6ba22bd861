"""Brief searches that reached the event loop together are done by one call.

What clients sent while the loop was at work is read at once, so under load a turn of the loop brings several searches. One
call for all of them costs little more than one for the first. Nothing waits for it: the call is made as soon as what the loop
had read is parsed. A search that is alone in the process is done on the spot.

Whether candidates have to be transformed shows once they are found. If it would take too long, the search goes on from there in
a thread, as many at once as there are cores for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from anyio import CapacityLimiter, to_thread

from gallery.search.brief import AT_MOST, MOST_CANDIDATES, MOST_WEIGHTS, NotBrief
from gallery.search.coalesce import kind_of, stacked
from gallery.search.request import Answer, SearchRequest
from gallery.search.run import Searcher
from gallery.snapshot import World
from service.metrics import Metrics
from service.slots import Slots


class Found(NamedTuple):
    """An answer, and which of its queries was asked."""

    answer: Answer
    query: int


class _Asked(NamedTuple):
    """A search, and who waits for it."""

    request: SearchRequest
    since: float
    found: asyncio.Future[Found]


class Gatherer:
    """One per application, used from its event loop only."""

    def __init__(self, searcher: Searcher, metrics: Metrics, slots: Slots, *, most: int, lanes: int) -> None:
        """Ask `searcher`, and count in `metrics`.

        Args:
            searcher: does the searches.
            metrics: counts them.
            slots: for those that go on in a thread.
            most: so many may wait for the loop.
            lanes: so many may go on in threads at once.
        """
        self._searcher = searcher
        self._metrics = metrics
        self._slots = slots
        self._most = most
        self._lanes = CapacityLimiter(lanes)
        self._under_way = set[asyncio.Task[None]]()  # the loop itself keeps no task alive
        #: whether the server has no other request under way; it says so once it serves
        self.alone: Callable[[], bool] = lambda: False
        self._asked: dict[Any, list[_Asked]] = {}

    async def search(self, world: World, gallery: str, request: SearchRequest, reads: int) -> Found:
        """Search once the loop has come to the end of what it has read, or now if that is nothing else.

        Args:
            world: what the process sees now.
            gallery: its name.
            request: of one query, without a filter.
            reads: numbers that the search reads, of which one call may read so many that the loop goes on soon.

        Raises:
            GalleryError: as `Searcher.search`; never for the sake of another's query.
            NotBrief: too many wait already, or of several that were asked together one failed.
        """
        since = time.perf_counter()
        if self.alone():
            try:
                return self._one(world, gallery, request, since)
            except NotBrief as halted:
                answer = await self._rest_of(halted)
            self._metrics.answered([answer], [time.perf_counter() - since])
            return Found(answer, 0)
        if sum(map(len, self._asked.values())) >= self._most:
            raise NotBrief(f"{self._most} searches wait")
        loop = asyncio.get_running_loop()
        asked = _Asked(request, since, loop.create_future())
        kind = kind_of(world, gallery, request)
        waiting = self._asked.get(kind)
        if waiting is None:
            self._asked[kind] = [asked]
            candidates = request.k * (request.oversample or self._searcher.oversample)
            at_once = max(1, min(AT_MOST // max(1, reads), MOST_CANDIDATES // candidates))
            loop.call_soon(self._answer, kind, world, gallery, at_once)
        else:
            waiting.append(asked)
        return await asked.found

    def _answer(self, kind: Any, world: World, gallery: str, at_once: int) -> None:
        """Answer those of a kind; what is more than may be done at once has its turn after what has come meanwhile."""
        asked, rest = self._asked[kind][:at_once], self._asked[kind][at_once:]
        if rest:
            self._asked[kind] = rest
            asyncio.get_running_loop().call_soon(self._answer, kind, world, gallery, at_once)
        else:
            del self._asked[kind]
        try:
            request = asked[0].request if len(asked) == 1 else stacked([each.request for each in asked])
            answer = self._searcher.search(world, gallery, request, at_most=MOST_WEIGHTS)
        except NotBrief as halted:
            going_on = asyncio.get_running_loop().create_task(self._go_on(asked, halted))
            self._under_way.add(going_on)
            going_on.add_done_callback(self._under_way.discard)
        except Exception as error:  # noqa: BLE001 - whose fault it is cannot be told, so each finds out alone
            self._failed(world, gallery, asked, error)
        else:
            self._answered(asked, answer)

    async def _go_on(self, asked: Sequence[_Asked], halted: NotBrief) -> None:
        try:
            answer = await self._rest_of(halted)
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            for each in asked:
                if not each.found.cancelled():
                    each.found.set_exception(error if len(asked) == 1 else NotBrief("asked together"))
        else:
            self._answered(asked, answer)

    async def _rest_of(self, halted: NotBrief) -> Answer:
        if halted.rest is None:
            raise halted
        async with self._slots.taken():
            return await to_thread.run_sync(halted.rest, limiter=self._lanes)

    def _answered(self, asked: Sequence[_Asked], answer: Answer) -> None:
        self._metrics.answered([answer], [time.perf_counter() - each.since for each in asked])
        for query, each in enumerate(asked):
            if not each.found.cancelled():
                each.found.set_result(Found(answer, query))

    def _failed(self, world: World, gallery: str, asked: Sequence[_Asked], error: Exception) -> None:
        for each in asked:
            if each.found.cancelled():
                continue
            if len(asked) == 1:
                each.found.set_exception(error)
                continue
            try:
                each.found.set_result(self._one(world, gallery, each.request, each.since))
            except Exception as own:  # noqa: BLE001 - raised where it is waited for
                each.found.set_exception(own)

    def _one(self, world: World, gallery: str, request: SearchRequest, since: float) -> Found:
        answer = self._searcher.search(world, gallery, request, at_most=MOST_WEIGHTS)
        self._metrics.answered([answer], [time.perf_counter() - since])
        return Found(answer, 0)
