"""From which column, and by which transformations, a segment gets vectors of a space that it has no column of. Pure.

Upgrades and searches both ask here, so a vector that is mapped at query time is made as the stored one will be.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from gallery.spaces import Transformation


class Path(NamedTuple):
    """A way from a stored column to a space."""

    #: the model whose column it starts at
    column: str
    #: what is applied, in this order; never empty
    by: tuple[Transformation, ...]


def paths(columns: Mapping[str, int], target: str, known: Collection[Transformation], *, longest: int) -> list[Path]:
    """Every way from a segment's columns to a target, the best first.

    Each transformation adds its error, so the best path has the fewest of them between the target's vectors and those that a
    model made, stored steps included: a transformation of native vectors wins over one of derived vectors. Of equal paths the
    shortest goes first, since more of it is stored already; then the one that was registered last.

    Args:
        columns: by model that the segment has a column of, how many transformations made it; 0 where it is native.
        target: the model of the space.
        known: the transformations that may be used.
        longest: how many of them may follow each other.
    """
    found: list[Path] = []
    ends: list[tuple[Transformation, ...]] = [()]
    for _ in range(longest):
        ends = [(first, *end) for end in ends for first in known if _leads_on(first, end, target)]
        found += [Path(end[0].source, end) for end in ends if end[0].source in columns]
    return sorted(found, key=lambda path: (columns[path.column] + len(path.by), len(path.by), [-t.id for t in path.by]))


def feeds(transformation: Transformation, side_dimension: int | None, *, zeros: bool) -> bool:
    """Whether a segment has the side-information that a transformation needs, or zeros may stand for it."""
    return transformation.takes(side_dimension) or (zeros and side_dimension is None)


def source(
    columns: Mapping[str, int],
    side_dimension: int | None,
    target: str,
    pinned: Collection[Transformation],
    *,
    zeros: bool,
) -> Transformation | None:
    """The transformation that an upgrade makes a segment's column of the target by; it starts at the column to read.

    Args:
        columns: as in `paths`.
        side_dimension: width of the segment's side-information, null if it has none.
        target: the upgrade's target model.
        pinned: the transformations that the upgrade was started with.
        zeros: whether zeros stand for side-information that is missing.

    Returns:
        None where no pinned transformation starts at a column of the segment, or none of those has its side-information.
    """
    ways = (path.by[0] for path in paths(columns, target, pinned, longest=1))
    return next((way for way in ways if feeds(way, side_dimension, zeros=zeros)), None)


def _leads_on(first: Transformation, end: tuple[Transformation, ...], target: str) -> bool:
    """Whether a transformation leads to where the rest of a path begins, without going in a circle."""
    passed = {target, *(each.source for each in end)}
    return first.target == (end[0].source if end else target) and first.source not in passed
