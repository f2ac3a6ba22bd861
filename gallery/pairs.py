"""Pairs to fit a transformation from: items of a gallery, and the vectors that another model makes of the same items.

What a client sends is checked against the gallery and kept in files until the fit ends. What the items have themselves, their
vectors and side-information, is read when a worker begins, all of it as one moment of the gallery sees it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery import errors
from gallery.arrays import Rows, Vectors
from gallery.catalog import items as item_rows
from gallery.catalog import models as model_rows
from gallery.catalog.galleries import gallery_row, items_live
from gallery.catalog.tables import ColumnRow, FitRow, GalleryRow, SegmentRow
from gallery.columns import Ids, open_column, open_ids, verify, write, write_ids
from gallery.files import Files, Written
from gallery.spaces import EmbeddingModel
from gallery.store import Store
from gallery.vectors import accept

FITS = "fits"
_NAMED = 20  # ids that a refusal names
_LOOKS = 5


@dataclass(frozen=True, slots=True)
class NewPairs:
    """What a client sends, one entry per pair."""

    ids: Sequence[str]
    #: (n, target dimension)
    embeddings: NDArray[Any]
    #: what makes items relevant to each other, if anybody knows
    labels: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class AcceptedPairs:
    """Pairs that can be fitted, in the target model's convention."""

    gallery_id: int
    source: EmbeddingModel
    target: EmbeddingModel
    ids: Sequence[str]
    vectors: Vectors
    labels: Sequence[str] | None


class Kept(NamedTuple):
    """The durable files of accepted pairs."""

    ids: Written
    vectors: Written
    labels: Written | None

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [file.name for file in self if file is not None]


@dataclass(frozen=True, slots=True)
class Pairs:
    """What a transformation is fitted to, row by row the same item."""

    #: (n, source dimension) and (n, target dimension)
    source: Vectors
    target: Vectors
    #: (n, side dimension), where it is to be fitted too
    side: Vectors | None
    #: (n,) strings
    labels: NDArray[np.str_] | None
    #: live items of the gallery that they are a sample of
    gallery: int
    #: what of the request could not be used, and why
    warnings: tuple[str, ...] = ()


class _Part(NamedTuple):
    """The pairs whose items are in one segment."""

    segment: SegmentRow
    column: ColumnRow
    #: places in the request, and the rows of the segment that hold their items
    at: Rows
    rows: Rows


def accept_pairs(
    session: Session, gallery: str, target: str, pairs: NewPairs, *, use_side: bool | None
) -> AcceptedPairs:
    """Check pairs against the gallery that their items are in.

    Raises:
        GalleryNotFound, ModelNotFound: as they say.
        SameModel: the target is the gallery's own model.
        DuplicateId, ItemNotFound: an id is there twice, or its item is not; `missing` names the first of these.
        DimensionMismatch, InvalidVector, InvalidItem: an item cannot be used; the pointer names it.
        MissingSideInformation: it is asked for, and an item has none.
    """
    row = gallery_row(session, gallery, pointer="/gallery")
    source, target_row = model_rows.as_model(row.model), model_rows.model_row(session, target, pointer="/target")
    if target_row.id == row.model_id:
        raise errors.SameModel(f"{gallery} is in {target} already", pointer="/target")
    model = model_rows.as_model(target_row)
    _check_once(pairs.ids)
    vectors = accept(pairs.embeddings, model, pointer="/pairs/{row}/embedding")
    _check_items(session, row, source, pairs.ids, use_side=use_side)
    return AcceptedPairs(row.id, source, model, pairs.ids, vectors, pairs.labels)


def keep(files: Files, accepted: AcceptedPairs) -> Kept:
    """Make accepted pairs durable."""
    return Kept(
        write_ids(files, FITS, accepted.ids),
        write(files, FITS, accepted.vectors, "float32"),
        None if accepted.labels is None else write_ids(files, FITS, accepted.labels),
    )


def read(store: Store, fit: FitRow) -> Pairs:
    """Read what a fit is to be made from.

    Items that are gone since the request, or have no vector of the source model any more, are left out with a warning.

    Raises:
        UnusablePairs: all of them are.
        Damaged: a kept file does not have its digest.
        GalleryNotFound: the gallery was deleted.
    """
    for _ in range(_LOOKS - 1):
        try:
            return _read(store, fit)
        except FileNotFoundError:
            continue  # a finalized upgrade, or a merge, took a column away: the rows name another one now
    return _read(store, fit)


def _check_once(ids: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for at, item in enumerate(ids):
        if first.setdefault(item, at) != at:
            raise errors.DuplicateId(f"{item!r} is there twice", pointer=f"/pairs/{at}/id")


def _check_items(
    session: Session, gallery: GalleryRow, source: EmbeddingModel, ids: Sequence[str], *, use_side: bool | None
) -> None:
    # PostgreSQL cannot even be asked for text with a NUL, and no item is called so.
    places = item_rows.places(session, gallery.id, [item for item in ids if "\0" not in item])
    missing = [at for at, item in enumerate(ids) if item not in places]
    if missing:
        raise errors.ItemNotFound(
            f"{len(missing)} of {len(ids)} ids are not in {gallery.name}, the first is {ids[missing[0]]!r}: leave them "
            "out, or store these items first",
            pointer=f"/pairs/{missing[0]}/id",
            missing=[ids[at] for at in missing[:_NAMED]],
        )
    parts = _parts(session, gallery.id, gallery.model_id, ids, places)
    without = _others(len(ids), parts)
    if without.size:
        raise errors.InvalidItem(
            f"{without.size} of {len(ids)} items have no vector of {source.name}, the first is {ids[without[0]]!r}: leave "
            "them out",
            pointer=f"/pairs/{without[0]}/id",
        )
    bare = _others(len(ids), [part for part in parts if _has_side(part, source)])
    if use_side and bare.size:
        raise errors.MissingSideInformation(
            f"{bare.size} of {len(ids)} items have no side-information, the first is {ids[bare[0]]!r}: leave them out, or "
            "fit without `use_side_information`",
            pointer=f"/pairs/{bare[0]}/id",
        )


def _read(store: Store, fit: FitRow) -> Pairs:
    ids, vectors, labels = _kept(store.files, fit)
    with store.catalog.reading() as session:
        gallery = session.get(GalleryRow, fit.gallery_id)
        if gallery is None:
            raise errors.GalleryNotFound(f"the gallery {fit.gallery_name!r} was deleted")
        places = item_rows.places(session, gallery.id, ids)
        parts = _parts(session, gallery.id, fit.source_id, ids, places)
        source, live = model_rows.as_model(fit.source), items_live(session, gallery.id)
    used = np.zeros(len(ids), dtype=np.bool_)
    for part in parts:
        used[part.at] = True
    deleted = sum(item not in places for item in ids)
    left_out = {
        "their items were deleted meanwhile": deleted,
        f"their items have no vector of {source.name} any more": len(ids) - int(np.count_nonzero(used)) - deleted,
    }
    warnings = [f"{count} of {len(ids)} pairs are left out: {reason}" for reason, count in left_out.items() if count]
    if not used.any():
        raise errors.UnusablePairs("; ".join(warnings))
    side, why = _side(store.files, parts, source, fit)
    return Pairs(
        source=_stored(store.files, parts, source.dimension, len(ids))[used],
        target=np.asarray(vectors, dtype=np.float32)[used],
        side=None if side is None else side[used],
        labels=None if labels is None else np.array(list(labels), dtype=np.str_)[used],
        gallery=live,
        warnings=(*warnings, *why),
    )


def _kept(files: Files, fit: FitRow) -> tuple[list[str], NDArray[Any], Ids | None]:
    """Ids, vectors and labels as they were sent, after a look at their digests."""
    for name, sha256 in (
        (fit.ids_file, fit.ids_sha256),
        (fit.vectors_file, fit.vectors_sha256),
        (fit.labels_file, fit.labels_sha256),
    ):
        if name is not None:
            verify(files, name, sha256 or "")
    if fit.ids_file is None or fit.vectors_file is None:
        raise errors.LeaseLost(f"fit {fit.id} has ended")
    vectors = open_column(files.path(fit.vectors_file), rows=fit.pairs, dimension=fit.target.dimension)
    labels = None if fit.labels_file is None else open_ids(files.path(fit.labels_file), fit.pairs)
    return list(open_ids(files.path(fit.ids_file), fit.pairs)), vectors, labels


def _parts(
    session: Session, gallery_id: int, model_id: int, ids: Sequence[str], places: dict[str, tuple[int, int]]
) -> list[_Part]:
    """Where the items of pairs are, as far as they have a vector of the model."""
    wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for at, item in enumerate(ids):
        if item in places:
            segment_id, row = places[item]
            wanted[segment_id].append((at, row))
    found = session.execute(
        select(SegmentRow, ColumnRow)
        .join(ColumnRow, ColumnRow.segment_id == SegmentRow.id)
        .where(SegmentRow.gallery_id == gallery_id, ColumnRow.model_id == model_id, ColumnRow.published)
        .order_by(SegmentRow.id)
    )
    parts = []
    for segment, column in found:
        if segment.id in wanted:
            at, rows = np.array(wanted[segment.id], dtype=np.int64).T
            parts.append(_Part(segment, column, at, rows))
    return parts


def _others(count: int, parts: Sequence[_Part]) -> Rows:
    """The places that are in none of these parts."""
    return np.setdiff1d(np.arange(count), np.concatenate([np.empty(0, np.int64), *(part.at for part in parts)]))


def _has_side(part: _Part, source: EmbeddingModel) -> bool:
    """What came with the items in another model's convention is no side-information of this one."""
    return part.segment.side_file is not None and part.segment.side_dimension == source.side_dimension


def _stored(files: Files, parts: Sequence[_Part], dimension: int, count: int) -> Vectors:
    vectors = np.zeros((count, dimension), dtype=np.float32)
    for segment, column, at, rows in parts:
        vectors[at] = open_column(files.path(column.file), rows=segment.rows, dimension=dimension)[rows]
    return vectors


def _side(
    files: Files, parts: Sequence[_Part], source: EmbeddingModel, fit: FitRow
) -> tuple[Vectors | None, tuple[str, ...]]:
    """The side-information of all pairs, or none and why; a backward map is used on queries, which have none."""
    if fit.use_side is False or fit.direction == "backward" or source.side_dimension is None:
        return None, ()
    having = [part for part in parts if _has_side(part, source)]
    if len(having) < len(parts) or not parts:
        bare = sum(len(part.at) for part in parts) - sum(len(part.at) for part in having)
        return None, (f"side-information is not fitted: {bare} pairs have none",) if having else ()
    side = np.zeros((fit.pairs, source.side_dimension), dtype=np.float32)
    for segment, _, at, rows in parts:
        path = files.path(segment.side_file or "")
        side[at] = open_column(path, rows=segment.rows, dimension=source.side_dimension)[rows]
    return side, ()
