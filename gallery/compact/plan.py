"""Which segments are merged into one. Pure.

Merging everything that is small whenever something new came would write each row as often as there are requests. So
segments are merged with others of about their size, as log-structured stores do: a row is written again once per size,
and of each size only a few segments wait.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

DUST_ROWS = 64  # to write these again costs no more than to make a file, in their columns and in the catalog
#: segments in one merge: each is a value in several statements, and SQLite takes 32,766 of those, PostgreSQL 65,535
AT_ONCE = 2000
_WORN_ROWS = 1024  # for fewer deleted rows, a segment is not written again


class Piece(NamedTuple):
    """A segment, as far as merging goes."""

    segment_id: int
    rows: int
    live: int
    #: what segments must have in common to be merged: whose columns, where from, and which side-information
    kind: Hashable
    #: an active upgrade needs it as it is
    held: bool = False


class Rule(NamedTuple):
    """When to merge, and how far."""

    #: so many of about one size are merged
    segments: int
    #: no merged segment has more rows
    rows: int
    #: merge whatever is small, and leave out every deleted row: someone asked for it
    everything: bool = False


def merges(pieces: Iterable[Piece], rule: Rule) -> list[tuple[int, ...]]:
    """The segments that are to become one, group by group, each in the order of their ids.

    Groups of most segments come first: where there is time for one now and then, those that wait grow until it is their turn.

    No segment is in two groups. Applied again and again, this comes to an end: each merge leaves fewer segments, or fewer
    deleted rows. Segments without a live row are put together whatever they hold, since nothing of it is kept.
    """
    free = sorted(piece for piece in pieces if not piece.held)
    empty = [piece for piece in free if piece.live == 0]
    found = [_ids(run) for run in _runs(empty, rule.rows) if run]
    for group in _alike([piece for piece in free if 0 < piece.live <= rule.rows // 2], rule):
        found += [_ids(run) for run in _runs(group, rule.rows) if _pays(run, rule)]
    taken = {segment for merge in found for segment in merge}
    found += [(p.segment_id,) for p in free if p.segment_id not in taken and _worn(p, rule)]
    return sorted(found, key=len, reverse=True)


def _alike(pieces: Sequence[Piece], rule: Rule) -> Iterator[list[Piece]]:
    """Those of one kind and, unless everything is to be merged, of about one size."""
    groups: dict[tuple[Hashable, int], list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[piece.kind, 0 if rule.everything else _size(piece.live, rule.segments)].append(piece)
    yield from groups.values()


def _size(live: int, factor: int) -> int:
    """0 for dust, then one more for each time that it is `factor` times larger."""
    return 0 if live < DUST_ROWS else 1 + int(math.log(live / DUST_ROWS, max(2, factor)))


def _runs(pieces: Sequence[Piece], rows: int) -> Iterator[list[Piece]]:
    """The pieces in turn, cut into runs that one merge can take: `rows` live rows and `AT_ONCE` pieces at most."""
    run: list[Piece] = []
    live = 0
    for piece in pieces:
        if live + piece.live > rows or len(run) == AT_ONCE:
            yield run
            run, live = [], 0
        run.append(piece)
        live += piece.live
    yield run


def _pays(run: Sequence[Piece], rule: Rule) -> bool:
    """Whether to merge a run: two pieces are enough if someone asked, or if they fill a segment; else `rule.segments` are."""
    full = len(run) == AT_ONCE or sum(piece.live for piece in run) > rule.rows // 2
    return len(run) >= (2 if rule.everything or full else max(2, rule.segments))


def _worn(piece: Piece, rule: Rule) -> bool:
    """Whether a segment is written again only to be rid of its deleted rows."""
    dead = piece.rows - piece.live
    return dead > 0 if rule.everything else dead >= max(_WORN_ROWS, piece.live)


def _ids(run: Sequence[Piece]) -> tuple[int, ...]:
    return tuple(piece.segment_id for piece in run)
