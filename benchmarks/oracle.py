"""What an answer may say while others write: judged by the history of every item. Pure, but for its lock.

Every revision of an item is known with the time at which its write was sent, and at which it was acknowledged. Of two
moments, only those that are outside these spans have one right answer, so what is required is this:

- an item that was there for certain, from before the search was sent until its answer came, is found, once,
- an item that was certainly not there is not found,
- the score of what is found is that of a revision that may have been there.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

import numpy as np

from gallery.arrays import Vectors

#: how far a score may be from ours: float32 sums in another order
TOLERANCE = 2e-3


class Hit(NamedTuple):
    """One item of an answer, and its distance."""

    id: str
    score: float


@dataclass(slots=True)
class Revision:
    """One life of an item: written, and at some time deleted or replaced."""

    #: in each space, by the model's name
    vectors: Mapping[str, Vectors]
    #: when its write was sent
    sent: float
    #: when that was acknowledged; inf until then
    acknowledged: float = inf
    #: when the write that ends it was sent, and acknowledged
    ending: float = inf
    ended: float = inf

    def surely(self, asked: float, answered: float) -> bool:
        """Whether it was there during all of a search."""
        return self.acknowledged < asked and answered < self.ending

    def perhaps(self, asked: float, answered: float) -> bool:
        """Whether it may have been there during some of a search."""
        return self.sent < answered and asked < self.ended


@dataclass(slots=True)
class Oracle:
    """The history of a gallery of which each item is written by one thread; it may be asked from any."""

    #: by space: how far a vector may be from ours where another number type is computed in, as a part of its length
    apart: Mapping[str, float] = field(default_factory=dict)
    _items: dict[str, list[Revision]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def writing(self, now: float, written: Mapping[str, Mapping[str, Vectors]]) -> None:
        """Note that a write of these items, with their vectors in each space, is about to be sent."""
        with self._lock:
            for item, vectors in written.items():
                revisions = self._items.setdefault(item, [])
                _end(revisions, now)
                revisions.append(Revision(vectors, now))

    def deleting(self, now: float, items: Sequence[str]) -> None:
        """Note that a deletion is about to be sent."""
        with self._lock:
            for item in items:
                _end(self._items.get(item, []), now)

    def acknowledged(self, now: float, items: Sequence[str]) -> None:
        """Note that the write or the deletion of these items was acknowledged."""
        with self._lock:
            for item in items:
                for revision in self._items.get(item, []):
                    if revision.acknowledged == inf:
                        revision.acknowledged = now
                    if revision.ending < inf and revision.ended == inf:
                        revision.ended = now

    def forget(self, before: float) -> None:
        """Let go of revisions that ended before the earliest search that is still under way."""
        with self._lock:
            for item, revisions in self._items.items():
                self._items[item] = [each for each in revisions if each.ended >= before]

    def wrongs(
        self, space: str, query: Vectors, hits: Sequence[Hit], asked: float, answered: float, *, whole: bool
    ) -> list[str]:
        """What is wrong with an answer.

        Args:
            space: the model whose space the scores are in.
            query: (dimension,) in that space.
            hits: best first.
            asked, answered: when it was sent, and when the answer was there.
            whole: whether it asked for everything that there is, so that nothing may be missing.
        """
        with self._lock:
            looked_at = self._items.keys() if whole else {hit.id for hit in hits} & self._items.keys()
            items = {item: list(self._items[item]) for item in looked_at}
        apart = self.apart.get(space, 0.0)
        found = [_judged(hit, items.get(hit.id, []), space, query, asked, answered, apart) for hit in hits]
        wrongs = [wrong for wrong in found if wrong is not None]
        ids = [hit.id for hit in hits]
        if len(set(ids)) < len(ids):
            wrongs.append(f"found twice: {sorted({each for each in ids if ids.count(each) > 1})[:3]}")
        if [hit.score for hit in hits] != sorted(hit.score for hit in hits):
            wrongs.append("not in the order of the scores")
        if whole:
            there = {i for i, revisions in items.items() if any(each.surely(asked, answered) for each in revisions)}
            if missing := sorted(there - set(ids)):
                wrongs.append(f"{len(missing)} missing, such as {missing[:3]}")
        return wrongs


def _end(revisions: Sequence[Revision], now: float) -> None:
    for revision in revisions:
        revision.ending = min(revision.ending, now)


def _judged(
    hit: Hit, revisions: Sequence[Revision], space: str, query: Vectors, asked: float, answered: float, apart: float
) -> str | None:
    possible = [each for each in revisions if each.perhaps(asked, answered)]
    if not possible:
        return f"{hit.id} was found, and is deleted or was never written"
    scores = []
    for vector in (each.vectors[space] for each in possible):
        score = float(np.linalg.norm(vector - query))
        off = abs(score - hit.score) - TOLERANCE * max(1.0, score)
        # a vector that is so far from ours is at most so much nearer to the query, or farther from it
        if off <= 0 or off <= apart * float(np.linalg.norm(vector)):
            return None
        scores.append(score)
    return f"{hit.id} has the score {hit.score}, not one of {scores}"
