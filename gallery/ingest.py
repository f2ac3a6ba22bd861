"""Upsert and delete: one request, one transaction; answered only once it is durable.

The files of a request are written first, under names that nothing refers to. One transaction then marks what they replace
as deleted and names them. A crash before it leaves files that the sweep reclaims; a crash after it has lost nothing.

Side-information is uniform in a segment: a request whose items have it only in part makes two segments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy.orm import Session

from gallery import errors
from gallery.arrays import Mask, Rows, Stored, Vectors
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import items as item_rows
from gallery.catalog import models as model_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import GalleryRow, SegmentRow, UpgradeRow
from gallery.columns import Dtype, write, write_ids
from gallery.files import Written
from gallery.spaces import EmbeddingModel, Registry
from gallery.store import Store, columns_folder
from gallery.upgrade.states import TRANSFORMED, WORKING, State
from gallery.vectors import accept, accept_side

MAX_ID_BYTES = 512
_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class NewItems:
    """Items of one request, all embedded by one model."""

    model: str
    ids: Sequence[str]
    #: (n, dimension)
    embeddings: np.ndarray[Any, np.dtype[Any]]
    payloads: Sequence[Mapping[str, Any] | None]
    #: (items with side-information, side dimension), in the order of `has_side`
    side: np.ndarray[Any, np.dtype[Any]] | None = None
    #: (n,) which items have side-information; None means all or none, as `side` says
    has_side: Mask | None = None


class Upserted(NamedTuple):
    """What an upsert did."""

    upserted: int
    version: int


class Deleted(NamedTuple):
    """What a delete did."""

    deleted: int
    missing: list[str]


class _Changed(Exception):
    """The upgrade moved on between writing the files and naming them; write again for its new state."""


class _Role(NamedTuple):
    """What an upgrade wants of items that come in a model."""

    #: the upgrade that shall transform the new segment later
    queue: str | None = None
    #: the upgrade whose transformation must be applied with the request
    derive: str | None = None
    #: whether the derived column is seen at once, or waits for the cutover
    published: bool = False


class _Files(NamedTuple):
    """The durable files of one new segment."""

    rows: Rows
    ids: Written
    embeddings: Written
    side: Written | None
    derived: Written | None


@dataclass(frozen=True, slots=True)
class _Accepted:
    """A request that was checked, and where it goes."""

    gallery: GalleryRow
    model: EmbeddingModel
    items: NewItems
    embeddings: Vectors
    side: Vectors | None
    has_side: Mask


def upsert(store: Store, gallery: str, items: NewItems) -> Upserted:
    """Write items; those whose id is there already are replaced. All or nothing.

    Raises:
        GalleryNotFound, ModelNotFound: as they say.
        NoRoute, ModelRetired: the gallery takes no items of this model.
        Invalid: an item cannot be stored; the pointer names it.
    """
    for _ in range(_ATTEMPTS):
        try:
            return _upsert(store, gallery, items)
        except _Changed:
            continue
    raise errors.Conflict("the gallery's upgrade keeps changing its state; try again")


def delete(store: Store, gallery: str, ids: Sequence[str]) -> Deleted:
    """Delete items by id; unknown ids are reported, not refused."""
    wanted = list(dict.fromkeys(ids))
    with store.catalog.transaction("delete") as tx:
        row = gallery_rows.gallery_row(tx.session, gallery)
        version = gallery_rows.bump(tx.session, row.id)
        found = item_rows.mark_deleted(tx.session, row.id, wanted, version)
    return Deleted(len(found), [item for item in wanted if item not in found])


def _upsert(store: Store, gallery: str, items: NewItems) -> Upserted:
    with store.catalog.reading() as session:
        row = gallery_rows.gallery_row(session, gallery)
        registry = model_rows.registry(session)
        model = model_rows.as_model(model_rows.model_row(session, items.model))
        upgrades = upgrade_rows.of_gallery(session, row.id)
        role = _role(row, model, upgrades, registry)
    accepted = _accept(row, model, items)
    _accept_for(accepted, next((u for u in upgrades if u.id in (role.derive, role.queue)), None))
    upgrade = next((u for u in upgrades if u.id == role.derive), None)
    written = [_write(store, accepted, rows, upgrade) for rows in _uniform(accepted.has_side)]
    names = [file.name for new in written for file in (new.ids, new.embeddings, new.side, new.derived) if file]
    with store.catalog.transaction("upsert") as tx, store.files.unnamed(names):
        version = _publish(tx.session, accepted, role, upgrade, written)
    return Upserted(len(items.ids), version)


def _role(gallery: GalleryRow, model: EmbeddingModel, upgrades: Sequence[UpgradeRow], registry: Registry) -> _Role:
    """Whether a gallery takes items of a model, and what its upgrade wants of them.

    Raises:
        ModelRetired: a finalized upgrade left the model behind.
        NoRoute: the gallery's queries could not reach such items.
    """
    open_ = [u for u in upgrades if u.active or u.state == State.COMPLETED]
    current = open_[-1] if open_ else None
    if current is not None and model.name == current.source.name:
        if current.state in TRANSFORMED:
            shown = current.state == State.COMPLETED or current.cutover == "progressive"
            return _Role(derive=current.id, published=shown)
        return _Role(queue=current.id if current.state in WORKING else None)
    if model.id == gallery.model_id or (current is not None and model.name == current.target.name):
        return _Role()
    if current is not None and current.active:
        raise errors.NoRoute(
            f"{gallery.name} is being upgraded from {current.source.name} to {current.target.name}, which has no way for "
            f"vectors of {model.name}: send them in one of these two, or once the upgrade is over",
            pointer="/model",
        )
    if registry.between(model.name, gallery.model.name, "backward", {}) is not None:
        return _Role()
    if any(u.source.name == model.name and u.state == State.FINALIZED for u in upgrades):
        raise errors.ModelRetired(
            f"{gallery.name} was upgraded from {model.name} to {gallery.model.name} for good: embed with {gallery.model.name}",
            pointer="/model",
        )
    raise errors.NoRoute(
        f"{gallery.name} holds vectors of {gallery.model.name}; to add vectors of {model.name}, start an upgrade to it or "
        f"register a backward transformation from {model.name} to {gallery.model.name}",
        pointer="/model",
    )


def _accept(gallery: GalleryRow, model: EmbeddingModel, items: NewItems) -> _Accepted:
    if not items.ids:
        raise errors.InvalidItem("there are no items; send at least one", pointer="/items")
    _accept_ids(items.ids)
    _accept_payloads(items.payloads)
    if not len(items.ids) == len(items.embeddings) == len(items.payloads):
        raise errors.InvalidItem("every item has an id, an embedding and a payload or null", pointer="/items")
    embeddings = accept(items.embeddings, model, pointer="/items/{row}/embedding")
    _fits_storage(gallery, embeddings, "/items/{row}/embedding")
    n = len(items.ids)
    has_side = items.has_side if items.has_side is not None else np.full(n, items.side is not None)
    side = None
    if items.side is not None:
        if model.side_dimension is None:
            raise errors.DimensionMismatch(
                f"{model.name} was registered without side-information, but these items have some",
                pointer=f"/items/{int(np.argmax(has_side))}/side_information",
            )
        if len(items.side) != np.count_nonzero(has_side):
            raise errors.InvalidItem("side-information and the items that have it differ in number", pointer="/items")
        side = _accept_side_of(items.side, model.side_dimension, has_side)
        _fits_storage(gallery, side, "/items/{row}/side_information")
    return _Accepted(gallery, model, items, embeddings, side, has_side)


def _fits_storage(gallery: GalleryRow, vectors: Vectors, pointer: str) -> None:
    """A float16 gallery cannot hold large numbers: they would turn into infinity."""
    if gallery.storage_dtype == "float16" and (large := np.abs(vectors).max(axis=1) > np.finfo(np.float16).max).any():
        raise errors.InvalidVector(
            f"{gallery.name} stores float16, whose largest number is 65504",
            pointer=pointer.format(row=int(np.argmax(large))),
        )


def _accept_side_of(side: np.ndarray[Any, np.dtype[Any]], dimension: int, has_side: Mask) -> Vectors:
    """Check side-information; the pointer counts in items, not in items that have some."""
    try:
        return accept_side(side, dimension, pointer="{row}")
    except errors.Invalid as error:
        item = int(np.flatnonzero(has_side)[int(error.pointer or 0)])
        raise type(error)(str(error), pointer=f"/items/{item}/side_information") from error


def _accept_for(accepted: _Accepted, upgrade: UpgradeRow | None) -> None:
    """An upgrade that fails on missing side-information must not be made to fail by a write."""
    if upgrade is None or upgrade.missing_side != "fail" or accepted.has_side.all():
        return
    if upgrade.transformation.side_dimension is not None:
        raise errors.MissingSideInformation(
            f"{upgrade.transformation.name}, which upgrades this gallery, needs side-information of dimension "
            f"{upgrade.transformation.side_dimension}: send it, or embed the item with {upgrade.target.name}",
            pointer=f"/items/{int(np.argmin(accepted.has_side))}/side_information",
        )


def _accept_ids(ids: Sequence[str]) -> None:
    seen: set[str] = set()
    for at, item in enumerate(ids):
        if not item or len(item.encode(errors="surrogatepass")) > MAX_ID_BYTES or not item.isprintable():
            raise errors.InvalidItem(f"an id is 1 to {MAX_ID_BYTES} bytes of printable text", pointer=f"/items/{at}/id")
        if item in seen:
            raise errors.DuplicateId(f"the id {item!r} occurs twice in this request", pointer=f"/items/{at}/id")
        seen.add(item)


def _accept_payloads(payloads: Sequence[Mapping[str, Any] | None]) -> None:
    for at, payload in enumerate(payloads):
        if payload and not _storable(payload):
            raise errors.InvalidItem(
                "a payload is JSON without NaN, infinity, NUL characters or lone surrogates",
                pointer=f"/items/{at}/payload",
            )


def _storable(value: Any) -> bool:
    """What both databases can keep: PostgreSQL's JSONB refuses NUL, and JSON itself NaN."""
    if isinstance(value, str):
        return ("\0" not in value and value.isascii()) or not any("\ud800" <= c <= "\udfff" or c == "\0" for c in value)
    if isinstance(value, int | float):
        return abs(value) <= sys.float_info.max  # a larger integer would break every filter on its field
    if isinstance(value, Mapping):
        return all(_storable(key) and _storable(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(_storable(inner) for inner in value)
    return True


def _uniform(has_side: Mask) -> Iterator[Rows]:
    """The rows of each new segment: with side-information, and without."""
    for rows in (np.flatnonzero(has_side), np.flatnonzero(~has_side)):
        if rows.size:
            yield rows


def _write(store: Store, accepted: _Accepted, rows: Rows, upgrade: UpgradeRow | None) -> _Files:
    """Write the files of one new segment."""
    folder = columns_folder(accepted.gallery.id)
    dtype: Dtype = "float16" if accepted.gallery.storage_dtype == "float16" else "float32"
    embeddings, side = accepted.embeddings[rows].astype(dtype, copy=False), None
    if accepted.side is not None and accepted.has_side[rows[0]]:
        side = accepted.side.astype(dtype, copy=False)  # holds just the items that have some, in order
    derived = None if upgrade is None else _derive(store, upgrade, embeddings, side)
    return _Files(
        rows=rows,
        ids=write_ids(store.files, folder, [accepted.items.ids[row] for row in rows]),
        embeddings=write(store.files, folder, embeddings, dtype),
        side=write(store.files, folder, side, dtype) if side is not None else None,
        derived=None if derived is None else write(store.files, folder, derived, dtype),
    )


def _derive(store: Store, upgrade: UpgradeRow, embeddings: Stored, side: Stored | None) -> Vectors | None:
    """The items in the target model's space: every segment of the upgrade has it already, so they come with theirs."""
    transformation = model_rows.as_transformation(upgrade.transformation)
    if side is None and transformation.side_dimension is not None and upgrade.missing_side == "skip":
        return None
    return store.transforms.apply(transformation, model_rows.as_model(upgrade.target), embeddings, side)


def _publish(
    session: Session, accepted: _Accepted, role: _Role, upgrade: UpgradeRow | None, written: Sequence[_Files]
) -> int:
    """Name the files and replace what has these ids."""
    gallery_id = accepted.gallery.id
    version = gallery_rows.bump(session, gallery_id)
    _unchanged(session, accepted, role)
    item_rows.mark_deleted(session, gallery_id, accepted.items.ids, version)
    for new in written:
        segment = segment_rows.add_segment(
            session,
            gallery_id=gallery_id,
            version=version,
            rows=len(new.rows),
            ids=new.ids,
            side=new.side,
            side_dimension=accepted.model.side_dimension,
        )
        _add_columns(session, accepted, segment, role, upgrade, new)
        item_rows.add_items(
            session,
            gallery_id=gallery_id,
            segment_id=segment.id,
            ids=[accepted.items.ids[row] for row in new.rows],
            payloads=[accepted.items.payloads[row] for row in new.rows],
        )
        if role.queue is not None:
            # Work that arrives late goes last: segment ids only grow.
            upgrade_rows.add_segments(session, role.queue, [(segment.id, len(new.rows))], start=segment.id + (1 << 32))
    return version


def _unchanged(session: Session, accepted: _Accepted, role: _Role) -> None:
    """The gallery's row is locked now; if the upgrade wants something else than when the files were written, start over."""
    row = gallery_rows.gallery_row(session, accepted.gallery.name)
    upgrades = upgrade_rows.of_gallery(session, row.id)
    if row.id != accepted.gallery.id or _role(row, accepted.model, upgrades, model_rows.registry(session)) != role:
        raise _Changed


def _add_columns(
    session: Session, accepted: _Accepted, segment: SegmentRow, role: _Role, upgrade: UpgradeRow | None, new: _Files
) -> None:
    dtype = accepted.gallery.storage_dtype
    segment_rows.add_column(
        session,
        segment_id=segment.id,
        model_id=accepted.model.id,
        written=new.embeddings,
        dtype=dtype,
        origin="native",
        published=True,
    )
    if upgrade is not None and new.derived is not None:
        segment_rows.add_column(
            session,
            segment_id=segment.id,
            model_id=upgrade.target_id,
            written=new.derived,
            dtype=dtype,
            origin="derived",
            published=role.published,
            transformation_id=upgrade.transformation_id,
            upgrade_id=upgrade.id,
        )
