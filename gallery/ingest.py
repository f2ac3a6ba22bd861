"""Upsert and delete: one transaction for a request, or for several that met; answered only once it is durable.

The files of requests are written first, under names that nothing refers to. One transaction then marks what they replace
as deleted and names them. A crash before it leaves files that are removed as orphans; a crash after it has lost nothing.

Side-information is uniform in a segment: where items have it only in part, they make two segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from sqlalchemy.orm import Session

from gallery import errors
from gallery.arrays import Dtype, Rows, Stored
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import items as item_rows
from gallery.catalog import models as model_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import GalleryRow, SegmentRow, UpgradeRow
from gallery.columns import write, write_ids
from gallery.files import Written
from gallery.lineage import Lineage, Step
from gallery.new_items import AcceptedItems, NewItems, accept_for_upgrades, accept_items, joined
from gallery.roles import Pinned, Role, check_reachable, is_of, role
from gallery.spaces import EmbeddingModel, Transformation
from gallery.store import Store, columns_folder
from gallery.upgrade.sources import choose

_ATTEMPTS = 10


class Upserted(NamedTuple):
    """What an upsert did."""

    upserted: int
    version: int
    #: whether an upgrade waits for it
    queued: bool


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


def upsert(store: Store, gallery: str, items: NewItems) -> Upserted:
    """Write items; those whose id is there already are replaced. All or nothing.

    Raises:
        GalleryNotFound, ModelNotFound: as they say.
        NoRoute, ModelRetired: the gallery takes no items of this model.
        Invalid: an item cannot be stored; the pointer names it.
    """
    return settled(upsert_each(store, gallery, [items])[0])


def settled(outcome: Upserted | errors.GalleryError) -> Upserted:
    """What `upsert_each` says was done of a request.

    Raises:
        GalleryError: it was refused.
    """
    if not isinstance(outcome, errors.GalleryError):
        return outcome
    try:
        raise outcome
    finally:
        del outcome  # it refers to this frame, and so to itself: what it holds would stay until garbage is collected


def upsert_each(store: Store, gallery: str, requests: Sequence[NewItems]) -> Sequence[Upserted | errors.GalleryError]:
    """Write the items of several requests as `upsert` does those of one, by one transaction.

    Args:
        store: where to.
        gallery: its name.
        requests: of one model, no id in two of them.

    Returns:
        For each request what was done, or why it was refused. Others are written all the same.

    Raises:
        GalleryError: it is not known which request is at fault.
    """
    for _ in range(_ATTEMPTS):
        try:
            return _upsert(store, gallery, requests)
        except _Changed:
            continue
    raise errors.Conflict("the gallery's upgrade keeps changing its state; try again")


def delete(store: Store, gallery: str, ids: Sequence[str]) -> Deleted:
    """Delete items by id; unknown ids are reported, not refused.

    Raises:
        GalleryNotFound: none has the name.
    """
    (deleted,) = delete_each(store, gallery, [ids])
    return deleted


def delete_each(store: Store, gallery: str, requests: Sequence[Sequence[str]]) -> Sequence[Deleted]:
    """Delete the items of several requests as `delete` does those of one, by one transaction, as if they came in this order."""
    wanted = list(dict.fromkeys(item for ids in requests for item in ids))
    with store.catalog.transaction("delete") as tx:
        row = gallery_rows.gallery_row(tx.session, gallery)
        version = gallery_rows.bump(tx.session, row.id)
        live = item_rows.mark_deleted(tx.session, row.id, wanted, version)
    told = []
    for ids in requests:
        own = dict.fromkeys(ids)
        told.append(Deleted(len(live & own.keys()), [item for item in own if item not in live]))
        live -= own.keys()
    return told


def _upsert(store: Store, gallery: str, requests: Sequence[NewItems]) -> Sequence[Upserted | errors.GalleryError]:
    with store.catalog.reading() as session:
        row = gallery_rows.gallery_row(session, gallery)
        model = model_rows.as_model(model_rows.model_row(session, requests[0].model, pointer="/model"))
        wanted = _wanted(session, row, model)
    outcomes = [_accepted(row, model, wanted, items) for items in requests]
    all_accepted = [each for each in outcomes if isinstance(each, AcceptedItems)]
    if not all_accepted:
        return [each for each in outcomes if isinstance(each, errors.GalleryError)]
    accepted = joined(all_accepted)
    with store.files.batch() as files:
        written = [_write(replace(store, files=files), accepted, rows, wanted) for rows in accepted.uniform()]
    names = [name for new in written for name in new.names]
    with store.catalog.transaction("upsert") as tx, store.files.unnamed(names):
        version = _publish(tx.session, accepted, wanted, written)
    queued = wanted.role.queue is not None
    return [
        Upserted(len(each.items.ids), version, queued) if isinstance(each, AcceptedItems) else each for each in outcomes
    ]


def _accepted(
    row: GalleryRow, model: EmbeddingModel, wanted: _Wanted, items: NewItems
) -> AcceptedItems | errors.GalleryError:
    """The items of a request, or why they are refused."""
    try:
        accepted = accept_items(row, model, items)
        accept_for_upgrades(accepted, wanted.role, wanted.stack, wanted.pinned)
    except errors.GalleryError as error:
        # A new one: this one's traceback holds every call that led here, and so itself and the items of all.
        return type(error)(str(error), pointer=error.pointer, **error.details)
    return accepted


def _wanted(session: Session, row: GalleryRow, model: EmbeddingModel) -> _Wanted:
    stack = upgrade_rows.open_of(session, row.id)
    pinned = {each.id: upgrade_rows.transformations(session, each) for each in stack}
    if is_of(row, model, stack):
        return _Wanted(role(model, stack, pinned), stack, pinned)
    # Seldom: for the other items neither old upgrades nor the registry are read, under the gallery's lock once more.
    check_reachable(row, model, upgrade_rows.of_gallery(session, row.id), stack, model_rows.registry(session))
    return _Wanted(Role(), stack, pinned)


def _write(store: Store, accepted: AcceptedItems, rows: Rows, wanted: _Wanted) -> _Files:
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
    store: Store, accepted: AcceptedItems, wanted: _Wanted, embeddings: Stored, side: Stored | None, dtype: Dtype
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


def _publish(session: Session, accepted: AcceptedItems, wanted: _Wanted, written: Sequence[_Files]) -> int:
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


def _unchanged(session: Session, accepted: AcceptedItems, wanted: _Wanted) -> None:
    """Start over if the upgrades want something else than when the files were written. The gallery's row is locked by now."""
    row = gallery_rows.gallery_row(session, accepted.gallery.name)
    if row.id != accepted.gallery.id:
        raise _Changed
    now_wanted = _wanted(session, row, accepted.model)
    if now_wanted.role != wanted.role:
        raise _Changed
    # An upgrade that validation had refused may have been resumed meanwhile.
    accept_for_upgrades(accepted, now_wanted.role, now_wanted.stack, now_wanted.pinned)


def _add_columns(session: Session, accepted: AcceptedItems, segment: SegmentRow, new: _Files) -> None:
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
