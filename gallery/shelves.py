"""Segments that are alike, searched as if they were one.

Each call of an index costs the same whatever it finds, so a gallery of many segments is asked in as few calls as can be:
segments with columns of the same models, made in as many steps, whose indexes can be joined, stand on one shelf.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from gallery.arrays import Rows, Stored
from gallery.index.base import Index
from gallery.index.selection import Selected
from gallery.views import Column, SegmentView


@dataclass(frozen=True, slots=True)
class Shelf:
    """Some segments of a snapshot; their rows follow each other."""

    segments: tuple[SegmentView, ...]
    #: (segments + 1,) int64: their positions in the snapshot, ascending; and -1, where no row is
    positions: Rows
    #: (segments + 1,) int64: the first row of each; and 0
    offsets: Rows
    #: of all segments
    rows: int
    #: by model name, over all rows
    indexes: Mapping[str, Index]
    #: the live rows; None where all are
    selected: Selected | None
    live: int

    def places(self, rows: Rows) -> tuple[Rows, Rows]:
        """The positions of the segments that hold some rows, and the rows there; -1 for -1."""
        if len(self.segments) == 1:
            return self.positions[np.minimum(rows, 0)], rows  # 0 picks the one, -1 what is last
        found = self.offsets[:-1].searchsorted(rows, side="right") - 1  # -1 for -1, which picks what is last
        return self.positions[found], rows - self.offsets[found]

    def each(self) -> Iterator[tuple[int, int, SegmentView]]:
        """Each segment with its position in the snapshot and its first row here."""
        return zip(self.positions.tolist(), self.offsets.tolist(), self.segments, strict=False)

    def of(self, rows: Rows) -> Iterator[tuple[int, SegmentView, Rows]]:
        """Each segment that holds some of the ascending `rows`, with its position in the snapshot and its own rows."""
        for position, start, view in self.each():
            first, last = np.searchsorted(rows, [start, start + view.rows])
            if first < last:
                yield position, view, rows[first:last] - start


#: moves an index to where it is searched, such as a GPU, and makes it ready; told its columns, see `gallery.index.device`
Place = Callable[[Index, Sequence[Stored]], Index]


def shelved(
    segments: Sequence[SegmentView], before: Sequence[Shelf] = (), place: Place | None = None
) -> tuple[Shelf, ...]:
    """Put the segments of a snapshot on shelves. Shelves of `before` are taken over where none of their segments changed."""
    alike: dict[Hashable, list[int]] = {}
    for at, view in enumerate(segments):
        alike.setdefault(_kind(view), []).append(at)
    known = {_contents(shelf.segments): shelf for shelf in before}
    runs = [run for group in alike.values() for run in _runs(segments, group, known)]
    return tuple(_shelf(segments, run, known, place) for run in sorted(runs))


def _kind(view: SegmentView) -> Hashable:
    """What segments on one shelf have in common: a plan treats them alike, and their indexes can be joined."""
    joins = {name: column.index.joins for name, column in view.columns.items()}
    if any(join is None for join in joins.values()):
        return view.id
    made = {name: (len(column.lineage), joins[name]) for name, column in view.columns.items()}
    return (view.side_dimension, view.live > 0, frozenset(made.items()))


def _runs(
    segments: Sequence[SegmentView], alike: Sequence[int], known: Mapping[Hashable, Shelf]
) -> Iterator[list[int]]:
    """Segments that are alike, cut into shelves that are not too large.

    Shelves that are full stay as they are while their segments do, so that a new segment costs the joining of one shelf and
    not of all.
    """
    room = _room(segments[alike[0]])
    places = {segments[at].id: at for at in alike}
    rest = set(alike)
    for shelf in known.values():
        run = [places[view.id] for view in shelf.segments if view.id in places]
        if 2 * shelf.rows > room and _contents([segments[at] for at in run]) in known and rest.issuperset(run):
            rest.difference_update(run)
            yield run
    run, rows = list[int](), 0
    for at in sorted(rest):
        if run and rows + segments[at].rows > room:
            yield run
            run, rows = [], 0
        run.append(at)
        rows += segments[at].rows
    if run:
        yield run


def _room(view: SegmentView) -> int:
    """How many rows a shelf of such segments may have."""
    return min((column.index.joins.rows for column in view.columns.values() if column.index.joins), default=0)


def _contents(segments: Sequence[SegmentView]) -> Hashable:
    """A key of the segments and their indexes; equal where both are the same."""
    return tuple(
        (view.id, tuple((column.id, column.index_file) for column in view.columns.values())) for view in segments
    )


def _shelf(
    segments: Sequence[SegmentView], run: Sequence[int], known: Mapping[Hashable, Shelf], place: Place | None
) -> Shelf:
    views = tuple(segments[at] for at in run)
    before = known.get(_contents(views))
    live = sum(view.live for view in views)
    positions = np.array([*run, -1], np.int64)
    if before is not None:
        selected = before.selected if before.live == live else _selected(views)
        return replace(before, segments=views, positions=positions, selected=selected, live=live)
    *starts, rows = accumulate((view.rows for view in views), initial=0)
    return Shelf(
        segments=views,
        positions=positions,
        offsets=np.array([*starts, 0], np.int64),
        rows=rows,
        indexes={name: _joined([view.columns[name] for view in views], place) for name in views[0].columns},
        selected=_selected(views),
        live=live,
    )


def _joined(columns: Sequence[Column], place: Place | None) -> Index:
    first, *others = [column.index for column in columns]
    # Also of one alone a shelf has an object of its own: what searches need in memory goes with the shelf, and does not stay
    # beside what is made of the segment once it is joined with others.
    joined = first.join(others) if others else copy(first)
    return joined if place is None else place(joined, [column.vectors for column in columns])


def _selected(views: Sequence[SegmentView]) -> Selected | None:
    if all(view.selected is None for view in views):
        return None
    return Selected(
        np.concatenate([np.ones(view.rows, np.bool_) if view.selected is None else view.selected for view in views])
    )
