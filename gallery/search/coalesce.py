"""Searches that arrive while others like them run are done together, by one call.

One call for many queries costs less than a call for each: what Python does for each segment is done once, and from a few
queries on exact search is one matrix product. So much that arrives at once is worth stacking, but nothing is worth waiting
for: what `gallery.together` does with tasks is done with searches, so a lone one takes what it always took.

The answers are those of searches alone, bit for bit where the route is direct: no index lets a score depend on the batch.
What a transformation gives may differ in the last bit with the batch that it is given, here as in any search.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from gallery.search.request import Answer, SearchRequest
from gallery.snapshot import World
from gallery.together import Together


class Searches(Protocol):
    """What does the searches: a `Searcher`."""

    def search(self, world: World, gallery: str, request: SearchRequest) -> Answer:
        """Search one gallery at the version of `world`."""


class Coalescer:
    """Gathers searches; one per process, safe from many threads."""

    def __init__(self, searches: Searches, together: Together) -> None:
        """Gather in `together`, with a lane for each search that there are cores for."""
        self._searches = searches
        self._together = together

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

        def search(requests: Sequence[SearchRequest]) -> Sequence[Answer]:
            if len(requests) == 1:
                return [self._searches.search(world, gallery, requests[0])]
            found = self._searches.search(world, gallery, stacked(requests))
            return [_of(found, query) for query in range(len(requests))]

        return self._together.do(kind_of(world, gallery, request), request, search, most=lambda _: at_once)


def kind_of(world: World, gallery: str, request: SearchRequest) -> Hashable:
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
