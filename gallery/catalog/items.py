"""Rows of items: where an id lives, its payload, and since which version a row is deleted.

A row is never changed but for its deletion mark, so a filter that is asked for the rows of a snapshot's segments answers
for exactly that snapshot, whatever was written since.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    String,
    Table,
    bindparam,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.orm import Session
from sqlalchemy.sql.functions import aggregate_strings

from gallery import errors
from gallery.arrays import Rows
from gallery.catalog.listed import Part, among, as_json, listed, parts, values
from gallery.catalog.tables import ColumnRow, ItemRow, SegmentRow

T = TypeVar("T")
_FEW_SEGMENTS = 500  # that one statement names
# The tables and not the mapped classes: through the mapper, a statement with a list would be executed row by row.
_ITEMS, _SEGMENTS = cast(Table, ItemRow.__table__), cast(Table, SegmentRow.__table__)
_WRITTEN = ["gallery_id", "segment_id", "row", "item_id", "payload"]
_CHUNK = 5_000  # bound parameters of one statement; SQLite allows 32,766
_made: dict[str, Select[int, str | None]] = {}


def mark_deleted(session: Session, gallery_id: int, ids: Sequence[str], version: int) -> set[str]:
    """Mark the live rows of these ids as deleted since `version`; returns the ids that were live."""
    found, dead = set[str](), Counter[int]()
    for part in parts([(item,) for item in ids]):
        marked = session.execute(
            update(_ITEMS)
            .where(*_live(session, gallery_id, part))
            .values(deleted_version=version)
            .returning(_ITEMS.c.item_id, _ITEMS.c.segment_id),
            values(part),
        )
        for item, segment in marked:
            found.add(item)
            dead[segment] += 1
    if dead:
        session.connection().execute(
            update(_SEGMENTS)
            .where(_SEGMENTS.c.id == bindparam("segment"))
            .values(dead=_SEGMENTS.c.dead + bindparam("more")),
            [{"segment": segment, "more": more} for segment, more in dead.items()],
        )
    return found


def add_items(
    session: Session,
    *,
    gallery_id: int,
    segment_id: int,
    ids: Sequence[str],
    payloads: Sequence[Mapping[str, Any] | None],
) -> None:
    """Record the items of a new segment, in the order of its rows."""
    elements = [
        (item, None if payload is None else json.dumps(payload)) for item, payload in zip(ids, payloads, strict=True)
    ]
    for part in parts(elements):
        each = listed(session, part)
        item, payload = each.fields
        rows = select(
            literal(gallery_id), literal(segment_id), each.position, item, as_json(session, payload)
        ).select_from(each.table)
        session.execute(insert(_ITEMS).from_select(_WRITTEN, rows), values(part))


def live_item(session: Session, gallery_id: int, item_id: str) -> ItemRow:
    """The live row of an id.

    Raises:
        ItemNotFound: no live item has it.
    """
    row = session.scalar(
        select(ItemRow).where(
            ItemRow.gallery_id == gallery_id, ItemRow.item_id == item_id, ItemRow.deleted_version.is_(None)
        )
    )
    if row is None:
        raise errors.ItemNotFound(f"the gallery has no item {item_id!r}")
    return row


def places(session: Session, gallery_id: int, ids: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The (segment, row) of each id that has a live item."""
    found: dict[str, tuple[int, int]] = {}
    for part in parts([(item,) for item in ids]):
        rows = session.execute(
            select(ItemRow.item_id, ItemRow.segment_id, ItemRow.row).where(*_live(session, gallery_id, part)),
            values(part),
        )
        found.update({item: (segment, row) for item, segment, row in rows})
    return found


def ids_of(session: Session, segment_id: int) -> dict[int, str]:
    """The id of each row of a segment, whether it is live or deleted."""
    rows = session.execute(select(ItemRow.row, ItemRow.item_id).where(ItemRow.segment_id == segment_id))
    return dict(rows.all())


def id_at(session: Session, segment_id: int, row: int) -> str:
    """The id at a row of a segment, whether its item is live or deleted."""
    return session.scalars(select(ItemRow.item_id).where(ItemRow.segment_id == segment_id, ItemRow.row == row)).one()


def deleted_rows(session: Session, segment_id: int) -> Rows:
    """The rows of a segment whose items are deleted, in no order."""
    there = (ItemRow.segment_id == segment_id, ItemRow.deleted_version.is_not(None))
    return np.array(session.scalars(select(ItemRow.row).where(*there)).all(), dtype=np.int64)


def live_in(session: Session, segments: Sequence[int]) -> int:
    """Live items of some segments."""
    live = select(func.sum(SegmentRow.live))
    return sum(session.scalar(live.where(SegmentRow.id.in_(chunk))) or 0 for chunk in _chunks(segments))


def live_ids(session: Session, segments: Sequence[int], *, limit: int) -> list[str]:
    """The first ids of live items of some segments."""
    there = (ItemRow.segment_id.in_(segments[:_CHUNK]), ItemRow.deleted_version.is_(None))
    return list(
        session.scalars(select(ItemRow.item_id).where(*there).order_by(ItemRow.segment_id, ItemRow.row).limit(limit))
    )


def deleted_since(session: Session, gallery_id: int, version: int) -> dict[int, Rows]:
    """Per segment that searches look into, the rows that were deleted after `version`, in no order."""
    # A merge marks all rows of the segments that it retires. They are left out, and not the others chosen, of which SQLite would
    # read every row.
    retired = select(SegmentRow.id).where(SegmentRow.gallery_id == gallery_id, SegmentRow.retired_at.is_not(None))
    return _rows_by_segment(
        session,
        ItemRow.gallery_id == gallery_id,
        ItemRow.deleted_version > version,
        ItemRow.segment_id.not_in(retired),
    )


def matching(
    session: Session, gallery_id: int, segments: Iterable[int], condition: ColumnElement[bool]
) -> dict[int, Rows]:
    """Per segment, the rows whose payload fits a compiled filter, in no order; deleted rows included."""
    wanted, found = sorted(segments), dict[int, Rows]()
    # Asked about the gallery as a whole, a database reads the items of all galleries.
    for chunk in _chunks(wanted, _FEW_SEGMENTS):
        found |= _rows_by_segment(session, ItemRow.gallery_id == gallery_id, condition, ItemRow.segment_id.in_(chunk))
    return {segment: found.get(segment, np.empty(0, np.int64)) for segment in wanted}


def _rows_by_segment(session: Session, *there: ColumnElement[bool]) -> dict[int, Rows]:
    """The rows of items. A segment's come as one text: a million, one by one, would hold the interpreter for ten seconds."""
    joined = aggregate_strings(ItemRow.row.cast(String), ",")
    found = session.execute(select(ItemRow.segment_id, joined).where(*there).group_by(ItemRow.segment_id))
    return {segment: np.fromstring(text, np.int64, sep=",") for segment, text in found}


def payloads(session: Session, places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Mapping[str, Any] | None]:
    """The payloads of (segment, row) places.

    Raises:
        Outdated: there are no such rows any more: their segments were merged and reclaimed since.
    """
    asked = sorted(set(places))
    found: dict[tuple[int, int], Mapping[str, Any] | None] = {}
    for part in parts([(str(segment), str(row)) for segment, row in asked]):
        for at, text in session.execute(_payloads_of(session, part), values(part)):
            if text is not None:
                found[asked[part.start + at]] = json.loads(text)
    if len(found) < len(asked):
        raise errors.Outdated("items that were found were merged before their payloads were read; search again")
    return found


def _payloads_of(session: Session, part: Part) -> Select[int, str | None]:
    """The payloads at the (segment, row) places of a list, each with its position in this part; null where there is no row.

    It is made once: to make and to compile a condition for the places of each search took most of the time of a search. Each
    place is a query of its own, since of a list of pairs SQLite reads the whole table.
    """
    dialect = session.get_bind().dialect.name
    if dialect not in _made:
        each = listed(session, part._replace(start=0))
        segment, row = each.fields
        there = (ItemRow.segment_id == sql_cast(segment, BigInteger), ItemRow.row == sql_cast(row, Integer))
        payload = select(func.coalesce(sql_cast(ItemRow.payload, String), "null")).where(*there).scalar_subquery()
        _made[dialect] = select(each.position, payload).select_from(each.table)
    return _made[dialect]


def only_native_in(session: Session, gallery_id: int, model_id: int) -> int:
    """Live items whose segment has a native column of this model and no column of any other."""
    native = (
        select(ColumnRow.segment_id)
        .join(SegmentRow)
        .where(SegmentRow.gallery_id == gallery_id)
        .group_by(ColumnRow.segment_id)
        .having(func.count() == 1, func.min(ColumnRow.model_id) == model_id, func.min(ColumnRow.origin) == "native")
    )
    return session.scalar(select(func.sum(SegmentRow.live)).where(SegmentRow.id.in_(native))) or 0


def any_live(session: Session, segment_id: int) -> bool:
    """Whether a segment has a live item."""
    live = select(ItemRow.row).where(ItemRow.segment_id == segment_id, ItemRow.deleted_version.is_(None))
    return session.scalar(live.limit(1)) is not None


def _live(session: Session, gallery_id: int, ids: Part) -> tuple[ColumnElement[bool], ...]:
    """The conditions of a live row whose id is in this part of a list."""
    return ItemRow.gallery_id == gallery_id, among(session, _ITEMS.c.item_id, ids), ItemRow.deleted_version.is_(None)


def _chunks(things: Sequence[T], size: int = _CHUNK) -> Iterator[Sequence[T]]:
    for start in range(0, len(things), size):
        yield things[start : start + size]
