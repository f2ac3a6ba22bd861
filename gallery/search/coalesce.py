"""Searches that arrive while others like them run are done together, by one call.

One call for many queries costs less than a call for each: what Python does for each segment is done once, and from a few
queries on exact search is one matrix product. So much that arrives at once is worth stacking, but nothing is worth waiting
for: a search that finds a free lane runs at once, in its own thread. Only where all lanes are taken do searches gather, and
the lane that is free next takes all of them. There is no timer, so a lone search takes what it always took.

The answers are those of searches alone, bit for bit where the route is direct: no index lets a score depend on the batch.
What a transformation gives may differ in the last bit with the batch that it is given, here as in any search.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from threading import Event, Lock
from typing import Any, Protocol

import numpy as np

from gallery.search.request import Answer, SearchRequest
from gallery.snapshot import World


class Searches(Protocol):
    """What does the searches: a `Searcher`."""

    def search(self, world: World, gallery: str, request: SearchRequest) -> Answer:
        """Search one gallery at the version of `world`."""


class _Query:
    """A search of one query, on its way."""

    __slots__ = ("answer", "leads", "request", "woken")

    def __init__(self, request: SearchRequest) -> None:
        self.request = request
        self.woken = Event()
        #: the searches that its thread has to do, this one first; None while it waits, and for good if another thread does it
        self.leads: Sequence[_Query] | None = None
        #: if it is still None once the query is woken, its thread searches alone
        self.answer: Answer | None = None


class _Line:
    """The searches of one kind."""

    __slots__ = ("running", "waiting")

    def __init__(self) -> None:
        self.running = 0
        self.waiting: list[_Query] = []


class Coalescer:
    """Gathers searches; one per process, safe from many threads."""

    def __init__(self, searches: Searches, lanes: int) -> None:
        """Let `lanes` calls of one kind run at once before others gather: as many as there are cores for."""
        self._searches = searches
        self._lanes = lanes
        self._lock = Lock()
        # A kind has a line while a search of it is under way.
        self._lines: dict[Any, _Line] = {}

    def search(self, world: World, gallery: str, request: SearchRequest, *, at_once: int) -> Answer:
        """Search as `Searcher.search` does, together with others where that costs nobody anything.

        Args:
            world: what the process sees now; only searches of the same world are done together.
            gallery: its name.
            request: of one query; several, or one with a filter, are searched as they are.
            at_once: how many queries like this one a call may have.

        Raises:
            GalleryError: as `Searcher.search`; never for the sake of another's query.
        """
        if len(request.vectors) != 1 or request.filter is not None or at_once < 2:
            return self._searches.search(world, gallery, request)
        own, kind = _Query(request), kind_of(world, gallery, request)
        if not self._enter(kind, own):
            own.woken.wait()
        if own.leads is not None:
            try:
                self._answer(world, gallery, own.leads)
            finally:
                self._leave(kind, at_once)
        return own.answer or self._searches.search(world, gallery, request)

    def _enter(self, kind: Any, own: _Query) -> bool:
        """Take a lane; or wait in the line, and return False."""
        with self._lock:
            line = self._lines.setdefault(kind, _Line())
            if line.running == self._lanes:
                line.waiting.append(own)
                return False
            line.running += 1
        own.leads = [own]
        return True

    def _leave(self, kind: Any, at_once: int) -> None:
        """Give the lane to those who wait; to nobody, where nobody does."""
        with self._lock:
            line = self._lines[kind]
            group, line.waiting = line.waiting[:at_once], line.waiting[at_once:]
            if not group:
                line.running -= 1
                if not line.running:
                    del self._lines[kind]
                return
        group[0].leads = group
        group[0].woken.set()

    def _answer(self, world: World, gallery: str, group: Sequence[_Query]) -> None:
        """Answer a group; its first is the caller, who is awake."""
        if len(group) == 1:
            group[0].answer = self._searches.search(world, gallery, group[0].request)
            return
        try:
            # Whose fault it is cannot be told from a common error, so each then searches alone and finds out.
            with contextlib.suppress(Exception):
                found = self._searches.search(world, gallery, stacked([each.request for each in group]))
                for at, each in enumerate(group):
                    each.answer = _of(found, at)
        finally:
            for each in group[1:]:
                each.woken.set()


def kind_of(world: World, gallery: str, request: SearchRequest) -> Any:
    """What searches must have in common to be done together.

    The id of the world is enough: whoever waits in a line holds its world, so none gets the id of one that is gone.
    """
    return (
        id(world),
        gallery,
        request.model,
        frozenset(request.companions),
        request.k,
        request.oversample,
        request.allow_partial,
    )


def stacked(requests: Sequence[SearchRequest]) -> SearchRequest:
    """Requests of one kind as one, their queries in order."""
    first = requests[0]
    return replace(
        first,
        vectors=np.concatenate([each.vectors for each in requests]),
        companions={name: np.concatenate([each.companions[name] for each in requests]) for name in first.companions},
    )


def _of(answer: Answer, query: int) -> Answer:
    """What one query found."""
    own = slice(query, query + 1)
    return replace(answer, scores=answer.scores[own], segments=answer.segments[own], rows=answer.rows[own])
