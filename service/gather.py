"""Brief searches that reached the event loop together are done by one call.

What clients sent while the loop was at work is read at once, so under load a turn of the loop brings several searches. One
call for all of them costs little more than one for the first. Nothing waits for it: the call is made as soon as what the loop
had read is parsed. A search that is alone in the process is done on the spot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gallery.search.brief import AT_MOST, MOST_WEIGHTS, NotBrief
from gallery.search.coalesce import kind_of, stacked
from gallery.search.request import Answer, SearchRequest
from gallery.search.run import Searcher
from gallery.snapshot import World
from service.metrics import Metrics


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

    def __init__(self, searcher: Searcher, metrics: Metrics, most: int) -> None:
        """Ask `searcher`, and count in `metrics`; so many searches may wait."""
        self._searcher = searcher
        self._metrics = metrics
        self._most = most
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
            NotBrief: more would have to be transformed than the loop has time for, or too many wait already.
        """
        since = time.perf_counter()
        if self.alone():
            return self._one(world, gallery, request, since)
        if sum(map(len, self._asked.values())) >= self._most:
            raise NotBrief(f"{self._most} searches wait")
        loop = asyncio.get_running_loop()
        asked = _Asked(request, since, loop.create_future())
        kind = kind_of(world, gallery, request)
        waiting = self._asked.get(kind)
        if waiting is None:
            self._asked[kind] = [asked]
            loop.call_soon(self._answer, kind, world, gallery, max(1, AT_MOST // max(1, reads)))
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
        except NotBrief as error:  # one after the other would hold the loop for as long
            for each in asked:
                if not each.found.cancelled():
                    each.found.set_exception(NotBrief(*error.args))
            return
        except Exception as error:  # noqa: BLE001 - whose fault it is cannot be told, so each finds out alone
            self._failed(world, gallery, asked, error)
            return
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
