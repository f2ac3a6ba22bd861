"""Which indexes a segment may get. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gallery.index.registry import backend, names

AUTO = "auto"
EXACT = "flat"
# What `auto` tries in turn, until one has enough recall. Lists are built in a fraction of the time that a graph takes; the
# graph is for columns whose neighbours lie in many lists.
TRIED = ("ivf_pq", "ivf", "hnsw")
# The recall at 10 that is promised to queries is 0.98. Stored rows find each other a little better than queries find them,
# because the lists were made for them: where CIFAR-100 embeddings reached 0.98, their test set fell to 0.969.
RECALL = 0.99
# The recall that is enough within a segment that is a small part of its shelf (ADR 0049): the ten nearest of the shelf are
# nearer than those of the segment, and so in fewer lists. Where segments are alike, the effort that finds 0.97 of a
# segment's own neighbours finds 0.98 or more of the shelf's.
RECALL_JOINED = 0.97


class Choice(NamedTuple):
    """A backend to try, with complete parameters to try in turn: the first that reach the recall `enough` are taken."""

    kind: str
    efforts: Sequence[Mapping[str, Any]]
    enough: float


def check(settings: Mapping[str, Any]) -> None:
    """Refuse index settings that cannot be followed.

    Raises:
        ValueError: unknown kind or parameter.
    """
    choose(settings, rows=1, exact_below=0)


def choose(settings: Mapping[str, Any], *, rows: int, exact_below: int, total: int | None = None) -> Sequence[Choice]:
    """The indexes to try for a segment of `rows` rows, in turn; none where it is searched exactly.

    Args:
        settings: `{"kind": "auto" | a backend's name, ...}` with the backend's own parameters, which are used as given.
        rows: rows of the segment.
        exact_below: segments with fewer rows are searched exactly, which is then as fast as any.
        total: rows of the gallery, if it has more.

    Raises:
        ValueError: unknown kind or parameter.
    """
    kind = settings.get("kind", AUTO)
    parameters = {name: value for name, value in settings.items() if name != "kind"}
    if kind == AUTO:
        if parameters:
            raise ValueError(f"kind 'auto' takes no parameters, but got {', '.join(sorted(parameters))}")
        return (
            [Choice(name, backend(name).efforts(rows, total), RECALL) for name in TRIED] if rows >= exact_below else []
        )
    if kind not in names():
        raise ValueError(f"kind {kind!r} is not one of {', '.join((AUTO, *names()))}")
    complete = backend(kind).check(parameters)
    return [Choice(kind, [complete], 0.0)] if rows >= exact_below and kind != EXACT else []
