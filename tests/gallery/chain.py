"""A gallery of three models, old -> new -> newest, whose vectors are whole numbers and whose maps can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from sqlalchemy import select

from gallery.catalog.tables import ColumnRow, ModelRow, SegmentRow
from gallery.lineage import from_json
from tests.gallery.world import NEW, OLD, WITH_SIDE, Linear, World

NEWEST = 6
#: new -> newest
SECOND = Linear([[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, -1, 0, 0, 0, 0], [0, 0, 0, 0, 2, 0], [0, 0, 0, 1, 0, 1]])
#: old -> newest; not what the two others make together
DIRECT = Linear([[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 3]])
MAPS = {"first": WITH_SIDE, "second": SECOND, "direct": DIRECT}
DIMENSIONS = {"old": OLD, "new": NEW, "newest": NEWEST}


def prepared(folder: Path, *, direct: bool) -> World:
    """A gallery in old, and the transformations of the chain; with or without the one that leaves out new."""
    world = World.open(folder).prepare(("first", "old", "new", WITH_SIDE))
    world.register("newest", NEWEST)
    world.transformation("second", "new", "newest", SECOND, "forward")
    if direct:
        world.transformation("direct", "old", "newest", DIRECT)
    return world


def through(names: Sequence[str], vector: NDArray[Any], side: NDArray[Any] | None) -> NDArray[Any]:
    """A vector after these transformations."""
    for name in names:
        given = None if MAPS[name].side is None else side
        vector = MAPS[name](vector[None], None if given is None else given[None])[0]
    return vector


def columns(world: World) -> dict[int, dict[str, tuple[str, ...]]]:
    """Per segment that is there and model, the transformations that made its published column."""
    with world.store.catalog.reading() as session:
        rows = session.execute(
            select(ColumnRow, ModelRow.name)
            .join(ModelRow)
            .join(SegmentRow, SegmentRow.id == ColumnRow.segment_id)
            .where(SegmentRow.retired_at.is_(None), ColumnRow.published)
        ).all()
    found: dict[int, dict[str, tuple[str, ...]]] = {}
    for row, model in rows:
        found.setdefault(row.segment_id, {})[model] = tuple(step.transformation for step in from_json(row.lineage))
    return found


def digests(world: World) -> dict[tuple[int, str], str]:
    """Per segment that is there and model, the digest of its column."""
    with world.store.catalog.reading() as session:
        rows = session.execute(
            select(ColumnRow.segment_id, ModelRow.name, ColumnRow.sha256)
            .join(ModelRow, ModelRow.id == ColumnRow.model_id)
            .join(SegmentRow, SegmentRow.id == ColumnRow.segment_id)
            .where(SegmentRow.retired_at.is_(None))
        ).all()
    return {(segment, model): sha256 for segment, model, sha256 in rows}
