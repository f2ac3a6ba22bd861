"""Upsert and delete: one request, one transaction; answered only once it is durable.

The files of a request are written first, under names that nothing refers to. One transaction then marks what they replace
as deleted and names them. A crash before it leaves files that are removed as orphans; a crash after it has lost nothing.

Side-information is uniform in a segment: a request whose items have it only in part makes two segments.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy.orm import Session

from gallery import errors
from gallery.arrays import Dtype, Mask, Rows, Stored, Vectors
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import items as item_rows
from gallery.catalog import models as model_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import GalleryRow, SegmentRow, UpgradeRow
from gallery.columns import write, write_ids
from gallery.files import Written
from gallery.lineage import Lineage, Step
from gallery.roles import Pinned, Role, check_reachable, is_of, lacking, role
from gallery.spaces import EmbeddingModel, Transformation
from gallery.store import Store, columns_folder
from gallery.upgrade.sources import choose
from gallery.vectors import accept, accept_side

MAX_ID_BYTES = 512
#: objects and lists within each other; writers of JSON go 250 deep, so that what is stored can always be answered with
MAX_PAYLOAD_DEPTH = 64
_NO_PATHS = frozenset({".", ".."})
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


class _Wanted(NamedTuple):
    """What the gallery's upgrades want of the items of a request."""

    role: Role
    #: the open upgrades, each on top of the one before it
    stack: Sequence[UpgradeRow]
    pinned: Pinned

    @property
    def derive(self) -> list[tuple[UpgradeRow, bool]]:
        """The upgrades whose column is made with the request, and whether searches see it at once."""
        rows = {row.id: row for row in self.stack}
        return [(rows[each.upgrade], each.published) for each in self.role.derive]


class _Derived(NamedTuple):
    """A durable column that an upgrade wants of a new segment."""

    upgrade: UpgradeRow
    published: bool
    by: Transformation
    lineage: Lineage
    file: Written


class _Files(NamedTuple):
    """The durable files of one new segment."""

    rows: Rows
    ids: Written
    embeddings: Written
    side: Written | None
    derived: Sequence[_Derived]

    @property
    def names(self) -> list[str]:
        """All of them."""
        files = [self.ids, self.embeddings, *([self.side] if self.side else []), *(each.file for each in self.derived)]
        return [file.name for file in files]


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
        model = model_rows.as_model(model_rows.model_row(session, items.model, pointer="/model"))
        wanted = _wanted(session, row, model)
    accepted = _accept(row, model, items)
    _accept_for(accepted, wanted)
    written = [_write(store, accepted, rows, wanted) for rows in _uniform(accepted.has_side)]
    names = [name for new in written for name in new.names]
    with store.catalog.transaction("upsert") as tx, store.files.unnamed(names):
        version = _publish(tx.session, accepted, wanted, written)
    return Upserted(len(items.ids), version)


def _wanted(session: Session, row: GalleryRow, model: EmbeddingModel) -> _Wanted:
    stack = upgrade_rows.open_of(session, row.id)
    pinned = {each.id: upgrade_rows.transformations(session, each) for each in stack}
    if is_of(row, model, stack):
        return _Wanted(role(model, stack, pinned), stack, pinned)
    # Seldom: for the other items neither old upgrades nor the registry are read, under the gallery's lock once more.
    check_reachable(row, model, upgrade_rows.of_gallery(session, row.id), stack, model_rows.registry(session))
    return _Wanted(Role(), stack, pinned)


def _accept(gallery: GalleryRow, model: EmbeddingModel, items: NewItems) -> _Accepted:
    if not items.ids:
        raise errors.InvalidItem("there are no items; send at least one", pointer="/items")
    _accept_ids(items.ids)
    _accept_payloads(items.payloads)
    if not len(items.ids) == len(items.embeddings) == len(items.payloads):
        raise errors.InvalidItem("every item has an id, an embedding and a payload or null", pointer="/items")
    embeddings = accept(items.embeddings, model, pointer="/items/{row}/embedding")
    _fits_storage(gallery, embeddings, "/items/{row}/embedding", nonzero=model.metric == "cosine")
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


def _fits_storage(gallery: GalleryRow, vectors: Vectors, pointer: str, *, nonzero: bool = False) -> None:
    """Refuse vectors that float16 cannot hold: large numbers become infinity, and very small ones zero, without a direction."""
    if gallery.storage_dtype != "float16":
        return
    largest = np.abs(vectors).max(axis=1)
    if (large := largest > np.finfo(np.float16).max).any():
        raise errors.InvalidVector(
            f"{gallery.name} stores float16, whose largest number is 65504",
            pointer=pointer.format(row=int(np.argmax(large))),
        )
    if nonzero and (small := largest.astype(np.float16) == 0).any():
        raise errors.InvalidVector(
            f"{gallery.name} stores float16, in which this vector is zero: send it at unit length",
            pointer=pointer.format(row=int(np.argmax(small))),
        )


def _accept_side_of(side: np.ndarray[Any, np.dtype[Any]], dimension: int, has_side: Mask) -> Vectors:
    """Check side-information; the pointer counts in items, not in items that have some."""
    try:
        return accept_side(side, dimension, pointer="{row}")
    except errors.Invalid as error:
        item = int(np.flatnonzero(has_side)[int(error.pointer or 0)])
        raise type(error)(str(error), pointer=f"/items/{item}/side_information") from error


def _accept_for(accepted: _Accepted, wanted: _Wanted) -> None:
    """Refuse items without side-information that an open upgrade would fail on."""
    for rows in _uniform(accepted.has_side):
        side = accepted.model.side_dimension if accepted.has_side[rows[0]] else None
        upgrade = lacking(wanted.role, accepted.model, side, wanted.stack, wanted.pinned)
        if upgrade is not None:
            needed = [each for each in wanted.pinned[upgrade.id] if each.side_dimension is not None]
            by, width = (
                (needed[0].name, needed[0].side_dimension) if needed else (upgrade.transformation.name, "another")
            )
            raise errors.MissingSideInformation(
                f"{by}, which upgrades this gallery, needs side-information of dimension {width}: send it, or embed the item "
                f"with {upgrade.target.name}",
                pointer=f"/items/{int(rows[0])}/side_information",
            )


def _accept_ids(ids: Sequence[str]) -> None:
    seen: set[str] = set()
    for at, item in enumerate(ids):
        if not item or len(item.encode(errors="surrogatepass")) > MAX_ID_BYTES or not _is_text(item):
            raise errors.InvalidItem(
                f"an id is 1 to {MAX_ID_BYTES} bytes of text without control characters", pointer=f"/items/{at}/id"
            )
        if item in _NO_PATHS:
            raise errors.InvalidItem(
                "clients take '.' and '..' out of paths: choose another id", pointer=f"/items/{at}/id"
            )
        if item in seen:
            raise errors.DuplicateId(f"the id {item!r} occurs twice in this request", pointer=f"/items/{at}/id")
        seen.add(item)


def _is_text(item: str) -> bool:
    """No control characters, no lone surrogates. All else is somebody's writing, whether or not this Python knows it yet."""
    return item.isprintable() or not any(unicodedata.category(character) in ("Cc", "Cs") for character in item)


def _accept_payloads(payloads: Sequence[Mapping[str, Any] | None]) -> None:
    for at, payload in enumerate(payloads):
        if payload and not _storable(payload, MAX_PAYLOAD_DEPTH):
            raise errors.InvalidItem(
                f"a payload is JSON, nested at most {MAX_PAYLOAD_DEPTH} deep, without NaN, infinity, NUL characters or lone "
                "surrogates",
                pointer=f"/items/{at}/payload",
            )


def _storable(value: Any, depth: int) -> bool:
    """What both databases can keep, and answers can hold: PostgreSQL's JSONB refuses NUL, and JSON itself NaN."""
    if isinstance(value, str):
        return ("\0" not in value and value.isascii()) or not any("\ud800" <= c <= "\udfff" or c == "\0" for c in value)
    if isinstance(value, int | float):
        return abs(value) <= sys.float_info.max  # a larger integer would break every filter on its field
    if isinstance(value, Mapping):
        return depth > 0 and all(_storable(key, 0) and _storable(inner, depth - 1) for key, inner in value.items())
    if isinstance(value, list):
        return depth > 0 and all(_storable(inner, depth - 1) for inner in value)
    return True


def _uniform(has_side: Mask) -> Iterator[Rows]:
    """The rows of each new segment: with side-information, and without."""
    for rows in (np.flatnonzero(has_side), np.flatnonzero(~has_side)):
        if rows.size:
            yield rows


def _write(store: Store, accepted: _Accepted, rows: Rows, wanted: _Wanted) -> _Files:
    """Write the files of one new segment."""
    folder = columns_folder(accepted.gallery.id)
    dtype = accepted.gallery.storage_dtype
    embeddings, side = accepted.embeddings[rows].astype(dtype, copy=False), None
    if accepted.side is not None and accepted.has_side[rows[0]]:
        side = accepted.side.astype(dtype, copy=False)  # holds just the items that have some, in order
    return _Files(
        rows=rows,
        ids=write_ids(store.files, folder, [accepted.items.ids[row] for row in rows]),
        embeddings=write(store.files, folder, embeddings, dtype),
        side=write(store.files, folder, side, dtype) if side is not None else None,
        derived=_derive(store, accepted, wanted, embeddings, side, dtype),
    )


def _derive(
    store: Store, accepted: _Accepted, wanted: _Wanted, embeddings: Stored, side: Stored | None, dtype: Dtype
) -> list[_Derived]:
    """The new items' columns in the target models of upgrades that have transformed every other segment.

    A column is left out where its upgrade skips items without side-information, and these have none.
    """
    found: list[_Derived] = []
    vectors: dict[str, Stored] = {accepted.model.name: embeddings}
    made: dict[str, Lineage] = {accepted.model.name: ()}
    for upgrade, published in wanted.derive:
        lengths = {model: len(lineage) for model, lineage in made.items()}
        by = choose(upgrade, wanted.pinned[upgrade.id], lengths, None if side is None else side.shape[1])
        if by is None:
            continue
        mapped = store.transforms.apply(by, model_rows.as_model(upgrade.target), vectors[by.source], side)
        lineage = (*made[by.source], Step(by.name, by.artifact, by.source))
        file = write(store.files, columns_folder(accepted.gallery.id), mapped, dtype)
        found.append(_Derived(upgrade, published, by, lineage, file))
        vectors[by.target], made[by.target] = mapped.astype(dtype, copy=False), lineage
    return found


def _publish(session: Session, accepted: _Accepted, wanted: _Wanted, written: Sequence[_Files]) -> int:
    """Name the files and replace what has these ids."""
    gallery_id = accepted.gallery.id
    version = gallery_rows.bump(session, gallery_id)
    _unchanged(session, accepted, wanted)
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
        _add_columns(session, accepted, segment, new)
        item_rows.add_items(
            session,
            gallery_id=gallery_id,
            segment_id=segment.id,
            ids=[accepted.items.ids[row] for row in new.rows],
            payloads=[accepted.items.payloads[row] for row in new.rows],
        )
        if wanted.role.queue is not None:
            # Work that arrives late goes last: segment ids only grow.
            upgrade_rows.add_segments(
                session, wanted.role.queue, [(segment.id, len(new.rows))], start=segment.id + (1 << 32)
            )
    return version


def _unchanged(session: Session, accepted: _Accepted, wanted: _Wanted) -> None:
    """Start over if the upgrades want something else than when the files were written. The gallery's row is locked by now."""
    row = gallery_rows.gallery_row(session, accepted.gallery.name)
    if row.id != accepted.gallery.id:
        raise _Changed
    now_wanted = _wanted(session, row, accepted.model)
    if now_wanted.role != wanted.role:
        raise _Changed
    _accept_for(accepted, now_wanted)  # one that validation had refused may have been resumed meanwhile


def _add_columns(session: Session, accepted: _Accepted, segment: SegmentRow, new: _Files) -> None:
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
    for each in new.derived:
        segment_rows.add_column(
            session,
            segment_id=segment.id,
            model_id=each.upgrade.target_id,
            written=each.file,
            dtype=dtype,
            origin="derived",
            published=each.published,
            transformation_id=each.by.id,
            upgrade_id=each.upgrade.id,
            lineage=each.lineage,
        )
