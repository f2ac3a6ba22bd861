"""Brief searches that reached the event loop together are done by one call.

What clients sent while the loop was at work is read at once, so under load a turn of the loop brings several searches. One
call for all of them costs little more than one for the first. Nothing waits for it: the call is made as soon as what the loop
had read is parsed.

Whether candidates have to be transformed shows once they are found. If it would take too long, the search goes on from there in
a thread, as many at once as there are cores for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol

import structlog
from anyio import CapacityLimiter, to_thread

from gallery.errors import GalleryError
from gallery.search.brief import AT_MOST, MOST_CANDIDATES, MOST_WEIGHTS, NotBrief
from gallery.search.coalesce import kind_of, stacked
from gallery.search.request import Answer, SearchRequest
from gallery.search.run import Searcher
from gallery.snapshot import World
from service.errors import Unavailable
from service.metrics import Metrics
from service.slots import Slots

log = structlog.get_logger()


class Asker(Protocol):
    """Who asked, and is told once: it is answered, handed on, or refused."""

    #: by the performance counter, when
    since: float

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what cannot be done at once, which ends by one of the following."""

    def answered(self, answer: Answer, query: int) -> None:
        """Which of the queries of an answer was asked."""

    def hand_on(self) -> None:
        """It was not brief, or failed, and is done in a thread by itself, which finds out why."""

    def refuse(self, error: GalleryError) -> None:
        """The process ends."""


class _Asked(NamedTuple):
    request: SearchRequest
    asker: Asker


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
        self._asked: dict[Any, list[_Asked]] = {}

    def ask(self, world: World, gallery: str, request: SearchRequest, reads: int, asker: Asker) -> None:
        """Search once the loop has come to the end of what it has read.

        Args:
            world: what the process sees now.
            gallery: its name.
            request: of one query, without a filter.
            reads: numbers that the search reads, of which one call may read so many that the loop goes on soon.
            asker: is told what was found.
        """
        if sum(map(len, self._asked.values())) >= self._most:
            asker.hand_on()
            return
        kind = kind_of(world, gallery, request)
        waiting = self._asked.get(kind)
        if waiting is None:
            self._asked[kind] = [_Asked(request, asker)]
            candidates = request.k * (request.oversample or self._searcher.oversample)
            at_once = max(1, min(AT_MOST // max(1, reads), MOST_CANDIDATES // candidates))
            asyncio.get_running_loop().call_soon(self._answer, kind, world, gallery, at_once)
        else:
            waiting.append(_Asked(request, asker))

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
            if halted.rest is None:
                _hand_on(asked)
            else:
                asked[0].asker.start(self._go_on(asked, halted.rest))
        except Exception:  # noqa: BLE001 - whose fault it is cannot be told, so each finds out alone
            _hand_on(asked)
        else:
            self._answered(asked, answer)

    async def _go_on(self, asked: Sequence[_Asked], rest: Callable[[], Answer]) -> None:
        """Where it stopped, in a thread."""
        try:
            async with self._slots.taken():
                answer = await to_thread.run_sync(rest, limiter=self._lanes)
        except asyncio.CancelledError:
            for each in asked:
                each.asker.refuse(Unavailable(""))
            raise
        except Exception:  # noqa: BLE001 - as above
            _hand_on(asked)
        else:
            self._answered(asked, answer)

    def _answered(self, asked: Sequence[_Asked], answer: Answer) -> None:
        now = time.perf_counter()
        for query, each in enumerate(asked):
            try:
                each.asker.answered(answer, query)
            except Exception:  # of one, for whose sake the others must not wait for ever
                log.exception("answer_failed")
                each.asker.hand_on()
        self._metrics.answered([answer], [now - each.asker.since for each in asked])  # for which no client waits


def _hand_on(asked: Sequence[_Asked]) -> None:
    for each in asked:
        each.asker.hand_on()
