"""Brief searches that reached the event loop together are done by one call.

The loop reads at once what clients sent while it was at work, so under load one turn of it brings several searches. One call
for all of them costs little more than one for the first. No search waits for others to come: the call is made as soon as what
the loop had read is parsed.

Only once candidates are found is it known whether they have to be transformed. If that would take too long for the loop, the
search goes on from there in a thread; as many do at once as there are cores for.
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
    """Who asked for a search. Exactly one of `answered`, `hand_on` and `refuse` is called, once."""

    #: when it asked, by the performance counter
    since: float

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, which takes longer than the loop may be held up, and calls one of the following at its end."""

    def answered(self, answer: Answer, query: int) -> None:
        """Take the answer: what was found for the query of this number."""

    def hand_on(self) -> None:
        """The search was not brief, or failed: do it alone in a thread, where it is found out why."""

    def refuse(self, error: GalleryError) -> None:
        """The process ends before there is an answer."""


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
            slots: those of searches, which one that goes on in a thread takes.
            most: how many may wait for the loop.
            lanes: how many may go on in threads at once.
        """
        self._searcher = searcher
        self._metrics = metrics
        self._slots = slots
        self._most = most
        self._lanes = CapacityLimiter(lanes)
        self._asked: dict[Any, list[_Asked]] = {}

    def ask(self, world: World, gallery: str, request: SearchRequest, reads: int, asker: Asker) -> None:
        """Search as soon as the loop has parsed all that it has read.

        Args:
            world: what the process sees now.
            gallery: its name.
            request: of one query, without a filter.
            reads: how many numbers the search reads: what it costs, and so how many searches one call may do.
            asker: gets the answer.
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
        """Answer the searches of one kind. Those that are too many for one call have their turn after the loop has read again."""
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
        except Exception:  # noqa: BLE001 - it is not known which search is at fault, so each is done alone
            _hand_on(asked)
        else:
            self._answered(asked, answer)

    async def _go_on(self, asked: Sequence[_Asked], rest: Callable[[], Answer]) -> None:
        """Do the rest of a search in a thread."""
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
            except Exception:  # the others must get their answers all the same
                log.exception("answer_failed")
                each.asker.hand_on()
        self._metrics.answered([answer], [now - each.asker.since for each in asked])  # last: no client need wait for it


def _hand_on(asked: Sequence[_Asked]) -> None:
    for each in asked:
        each.asker.hand_on()
