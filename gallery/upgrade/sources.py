"""What an upgrade makes each segment's new column from. The possible sources are read here, and `gallery.paths` chooses.

An upgrade starts at the gallery's model. Segments may have columns of other models too: native ones that an earlier upgrade
left, until it is finalized. A transformation that leads from such a model to the target is pinned as well, and is used where
it leaves fewer transformations between the new vectors and those that a model made (ADR 0015).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery import errors
from gallery.catalog import models as model_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ColumnRow, GalleryRow, ModelRow, SegmentRow, TransformationRow, UpgradeRow
from gallery.paths import source
from gallery.spaces import Transformation


class Source(NamedTuple):
    """What one segment's new column is made from."""

    column: ColumnRow
    #: width of the column
    dimension: int
    transformation: Transformation


class Pinned(NamedTuple):
    """The transformations that an upgrade is started with."""

    #: from the gallery's model
    main: TransformationRow
    #: from the other models that the gallery has columns of
    others: Sequence[TransformationRow]


def pin(session: Session, gallery: GalleryRow, transformation: str | None, target: str | None) -> Pinned:
    """The transformations to a target: the one that was named, and for the other models the latest one of each.

    A transformation that its own fit advised against is used only where it is named.

    Args:
        session: of the transaction that starts the upgrade.
        gallery: which to upgrade; its row is locked.
        transformation: the name of one that shall be used.
        target: the model to come to; null where the transformation says it.

    Raises:
        ModelNotFound, TransformationNotFound: as they say.
        SameModel: the gallery is in the target already, or was before an upgrade that can still be rolled back.
        WrongTransformation: none leads there from the gallery's model, or the named one leads from or to somewhere else.
    """
    held = _held(session, gallery)
    named = _named(session, gallery, transformation, target, held) if transformation is not None else None
    to = named.target if named is not None else model_rows.model_row(session, target or "", pointer="/target_model")
    pointer = "/target_model" if named is None else "/transformation"
    _elsewhere(session, gallery, to, pointer)
    leading = [row for row in _forward_to(session, to.id) if row.source_id in held]
    latest = {row.source_id: row for row in leading if model_rows.as_transformation(row).advised}
    if named is not None:
        latest[named.source_id] = named
    if gallery.model_id not in latest:
        unadvised = [row.name for row in leading if row.source_id == gallery.model_id]
        but = (
            f" but {', '.join(unadvised)}, of which the fit said that it gains nothing by itself: name it to use it"
            if unadvised
            else ""
        )
        raise errors.WrongTransformation(
            f"no forward transformation from {gallery.model.name} to {to.name} is registered{but}", pointer=pointer
        )
    main = latest.pop(gallery.model_id)
    return Pinned(main, sorted(latest.values(), key=lambda row: row.id))


def of_segments(session: Session, upgrade: UpgradeRow, segments: Sequence[SegmentRow]) -> list[Source | None]:
    """For each segment what its new column is made from; None where it lacks a column or the side-information for it."""
    pinned = upgrade_rows.transformations(session, upgrade)
    columns = segment_rows.columns_of(session, [segment.id for segment in segments])
    found: list[Source | None] = []
    for segment in segments:
        mine = columns.get(segment.id, {})
        by = choose(upgrade, pinned, made(mine), segment.side_dimension)
        found.append(None if by is None else _source(session, mine[by.source], by))
    return found


def of_segment(session: Session, upgrade: UpgradeRow, segment: SegmentRow) -> Source | None:
    """As `of_segments`, for one segment."""
    return of_segments(session, upgrade, [segment])[0]


def without_column(session: Session, upgrade: UpgradeRow, segments: Sequence[SegmentRow]) -> list[SegmentRow]:
    """Segments that have no column which any of the upgrade's transformations starts at, whatever their side-information."""
    starts = {each.source for each in upgrade_rows.transformations(session, upgrade)}
    columns = segment_rows.columns_of(session, [segment.id for segment in segments])
    return [segment for segment in segments if starts.isdisjoint(columns.get(segment.id, {}))]


def unadvised(session: Session, target_id: int, segments: Sequence[SegmentRow]) -> list[str]:
    """The transformations that lead to a target from columns of some segments, and that their fits advised against."""
    columns = segment_rows.columns_of(session, [segment.id for segment in segments])
    there = {model for mine in columns.values() for model in mine}
    leading = [model_rows.as_transformation(row) for row in _forward_to(session, target_id)]
    return [each.name for each in leading if each.source in there and not each.advised]


def choose(
    upgrade: UpgradeRow, pinned: Sequence[Transformation], made: Mapping[str, int], side_dimension: int | None
) -> Transformation | None:
    """The transformation by which an upgrade makes the column of a segment, whether that is stored already or about to be.

    Args:
        upgrade: with its target and its policy for missing side-information.
        pinned: its transformations.
        made: by model that the segment has a column of, how many transformations made it.
        side_dimension: width of its side-information, null if it has none.
    """
    return source(made, side_dimension, upgrade.target.name, pinned, zeros=upgrade.missing_side == "zeros")


def made(columns: Mapping[str, ColumnRow]) -> dict[str, int]:
    """By model that a segment has a column of, how many transformations made it."""
    return {model: len(column.lineage) for model, column in columns.items()}


def _source(session: Session, column: ColumnRow, by: Transformation) -> Source:
    return Source(column, session.get_one(ModelRow, column.model_id).dimension, by)


def _named(
    session: Session, gallery: GalleryRow, name: str, target: str | None, held: frozenset[int]
) -> TransformationRow:
    """The transformation of a name; it must lead forward from a model that the gallery has columns of."""
    row = model_rows.transformation_row(session, name, pointer="/transformation")
    if target is not None and row.target.name != target:
        raise errors.WrongTransformation(
            f"{row.name} leads to {row.target.name}, not {target}", pointer="/target_model"
        )
    if row.direction != "forward":
        raise errors.WrongTransformation(
            f"{row.name} is a backward transformation: it maps queries from {row.source.name} to {row.target.name}; an "
            "upgrade maps stored vectors and needs a forward one",
            pointer="/transformation",
        )
    if row.source_id not in held and row.target_id != gallery.model_id:
        raise errors.WrongTransformation(
            f"{row.name} starts at {row.source.name}, but {gallery.name} holds vectors of {gallery.model.name}",
            pointer="/transformation",
        )
    return row


def _elsewhere(session: Session, gallery: GalleryRow, to: ModelRow, pointer: str) -> None:
    """Refuse a target that is the gallery's model, or was before an upgrade that is not finalized: its columns are there."""
    if to.id == gallery.model_id:
        raise errors.SameModel(f"{gallery.name} is in {to.name} already", pointer=pointer)
    for row in upgrade_rows.open_of(session, gallery.id):
        if row.source_id == to.id:
            raise errors.SameModel(
                f"{gallery.name} still has its columns of {to.name}: roll back upgrade {row.id} instead",
                pointer=pointer,
            )


def _held(session: Session, gallery: GalleryRow) -> frozenset[int]:
    """The gallery's model, those that its segments have columns of, and those that items may still come in."""
    below = [row.source_id for row in upgrade_rows.open_of(session, gallery.id)]
    found = (
        select(ColumnRow.model_id)
        .join(SegmentRow)
        .where(SegmentRow.gallery_id == gallery.id, SegmentRow.retired_at.is_(None))
    )
    return frozenset({gallery.model_id, *below, *session.scalars(found.distinct())})


def _forward_to(session: Session, model_id: int) -> Sequence[TransformationRow]:
    """The forward transformations to a model, in the order of their registration."""
    to = (TransformationRow.target_id == model_id, TransformationRow.direction == "forward")
    return session.scalars(select(TransformationRow).where(*to).order_by(TransformationRow.id)).all()
