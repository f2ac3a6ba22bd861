"""What galleries hold, counted for many of them at once: a page of galleries takes as many statements as one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from gallery.catalog.segments import MEASURED
from gallery.catalog.tables import ColumnRow, ModelRow, SegmentRow
from gallery.lineage import Lineage, from_json


@dataclass(slots=True)
class Held:
    """What a gallery holds for one model. Of columns that wait for a cutover, which no search sees yet, only the bytes count."""

    #: live items by what made their vector
    native_items: int = 0
    derived_items: int = 0
    #: live items by how their vector came about
    lineages: dict[Lineage, int] = field(default_factory=dict)
    bytes: int = 0
    index_bytes: int = 0
    #: of the index files; None where there are none
    index_kind: str | None = None
    #: the segments whose recall was measured, and how they are searched: by an index, or exactly after all
    measured: list[Mapping[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Holding:
    """What a gallery holds."""

    #: live ones
    items: int = 0
    #: which searches look into
    segments: int = 0
    #: live items that have side-information, and the bytes that it takes
    side_items: int = 0
    side_bytes: int = 0
    #: by the model's name, in the order of the names
    models: dict[str, Held] = field(default_factory=dict)


def holdings(session: Session, galleries: Collection[int]) -> dict[int, Holding]:
    """What each of these galleries holds."""
    count, there = SegmentRow.live, SegmentRow.retired_at.is_(None)
    rows = session.execute(
        select(
            SegmentRow.gallery_id,
            func.sum(count),
            func.sum(case((there, 1), else_=0)),
            func.sum(case((SegmentRow.side_file.is_not(None), count), else_=0)),
            func.sum(case((there, func.coalesce(SegmentRow.side_bytes, 0)), else_=0)),
        )
        .where(SegmentRow.gallery_id.in_(galleries))
        .group_by(SegmentRow.gallery_id)
    )
    models = held(session, galleries)
    found = {gallery: Holding(models=models[gallery]) for gallery in galleries}
    for gallery, *numbers in rows:
        each = found[gallery]
        each.items, each.segments, each.side_items, each.side_bytes = map(int, numbers)
    return found


def held(session: Session, galleries: Collection[int]) -> dict[int, dict[str, Held]]:
    """What each of these galleries holds for each model."""
    count = SegmentRow.live
    rows = session.execute(
        select(
            SegmentRow.gallery_id,
            ModelRow.name,
            ColumnRow.lineage,
            func.sum(case((ColumnRow.published & (ColumnRow.origin == "native"), count), else_=0)),
            func.sum(case((ColumnRow.published & (ColumnRow.origin == "derived"), count), else_=0)),
            func.sum(ColumnRow.bytes),
            func.coalesce(func.sum(ColumnRow.index_bytes), 0),
            func.max(case((ColumnRow.index_file.is_not(None), ColumnRow.index_kind))),
        )
        .join_from(ColumnRow, SegmentRow)
        .join(ModelRow, ModelRow.id == ColumnRow.model_id)
        .where(SegmentRow.gallery_id.in_(galleries), SegmentRow.retired_at.is_(None))
        .group_by(SegmentRow.gallery_id, ModelRow.name, ColumnRow.lineage)
        .order_by(ModelRow.name)
    )
    found: dict[int, dict[str, Held]] = {gallery: {} for gallery in galleries}
    for gallery, model, steps, *numbers, kind in rows:
        each = found[gallery].setdefault(model, Held())
        native, derived, taken, index = map(int, numbers)
        each.native_items += native
        each.derived_items += derived
        each.bytes += taken
        each.index_bytes += index
        each.index_kind = max(filter(None, (each.index_kind, kind)), default=None)
        if native + derived:
            lineage = from_json(steps)
            each.lineages[lineage] = each.lineages.get(lineage, 0) + native + derived
    for gallery, model, segment in _measured(session, galleries):
        found[gallery][model].measured.append(segment)
    return found


def _measured(session: Session, galleries: Collection[int]) -> list[tuple[int, str, Mapping[str, Any]]]:
    rows = session.execute(
        select(
            SegmentRow.gallery_id,
            ModelRow.name,
            ColumnRow.segment_id,
            SegmentRow.rows,
            ColumnRow.index_kind,
            ColumnRow.index_parameters,
        )
        .join_from(ColumnRow, SegmentRow)
        .join(ModelRow, ModelRow.id == ColumnRow.model_id)
        .where(
            SegmentRow.gallery_id.in_(galleries),
            SegmentRow.retired_at.is_(None),
            ColumnRow.index_parameters[MEASURED].as_float().is_not(None),
        )
        .order_by(ColumnRow.segment_id)
    )
    return [
        (gallery, model, {"segment": segment, "rows": count, "kind": kind, **parameters})
        for gallery, model, segment, count, kind, parameters in rows
    ]
