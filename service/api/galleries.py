"""Galleries, their items, and the probe queries that measure them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Query, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from gallery import errors, ingest
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import items as item_rows
from gallery.catalog import models as model_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.segments import MEASURED
from gallery.catalog.tables import GalleryRow, ItemRow
from gallery.compact import merge
from gallery.index.choose import AUTO, EXACT, check
from gallery.index.registry import names
from gallery.ingest import NewItems
from gallery.lineage import Step
from gallery.spaces import EmbeddingModel
from gallery.upgrade import lifecycle, quality
from gallery.vectors import accept
from gallery.views import SegmentView
from service import arrow, uploads
from service.auth import MayAdmin, MaySearch, MayWrite
from service.bodies import Body, Json, Name, Reference, Text, Vector, media_type, require_type, stack, within
from service.documents import documented
from service.errors import InvalidArrow
from service.paging import PageDep, fetch
from service.process import Process, ProcessDep, RequestSlot, once_more

router = APIRouter(tags=["galleries"])
_FREED_AT_ONCE = 256
_LOOKS = 5  # for an item; merges of its segment cannot follow each other faster than that


class GalleryBody(Body):
    """A gallery without items."""

    name: Name
    model: Reference
    index: dict[str, Any] = Field(
        default={"kind": "auto"},
        description=f"`kind` is one of {', '.join((AUTO, *names()))}; the rest are parameters of that kind.",
    )
    storage_dtype: Literal["float32", "float16"] = "float32"


class Item(Body):
    """An item, embedded by one model."""

    id: str = Field(description="1 to 512 bytes of printable text.")
    embedding: Vector
    side_information: Vector | None = None
    payload: dict[str, Any] | None = None


class ItemsBody(Body):
    """Items of one model."""

    model: Reference
    items: list[Item]


class IdsBody(Body):
    """Items by their ids."""

    ids: list[str]


class Probe(Body):
    """A query with its vector in each model, and the ids that are relevant to it, if they are known."""

    vectors: dict[Reference, Vector] = Field(min_length=1)
    relevant: list[Text] | None = None


class ProbesBody(Body):
    """Probe queries; they replace those that were there."""

    probes: list[Probe]


class StoredSideInformation(BaseModel):
    """How much side-information is stored."""

    items: int
    bytes: int


class LineageStep(BaseModel):
    """One transformation on the way from the vector that a model made."""

    transformation: str
    artifact_sha256: str
    source_model: str = Field(description="The model whose column it was applied to.")
    source_origin: Literal["native", "derived"] = Field(description="Whether that column was native or derived.")


class Lineage(BaseModel):
    """How derived vectors came about, and of how many live items."""

    items: int
    steps: list[LineageStep] = Field(description="The oldest first; it starts at a native column.")


class Column(BaseModel):
    """What is stored for one model."""

    model: str
    native_items: int = Field(description="Live items that the model itself embedded.")
    derived_items: int = Field(description="Live items whose vector came out of a transformation.")
    lineages: list[Lineage] = Field(description="How the derived ones came about.")
    bytes: int
    index: dict[str, Any] = Field(
        description="`kind` of the index files, and their `bytes`; `segments` whose recall was measured, each with its "
        "`kind`, parameters and `recall_at_10`; and as `recall_at_10` the smallest of theirs, null where there is none."
    )


class Gallery(BaseModel):
    """A gallery as it stands."""

    name: str
    model: str
    items: int
    segments: int
    version: int
    storage_dtype: str
    index: dict[str, Any] = Field(description="The settings that it was created with.")
    columns: list[Column]
    side_information: StoredSideInformation
    active_upgrade: str | None
    created_at: datetime


class Galleries(BaseModel):
    """A page of galleries, in the order of their names."""

    galleries: list[Gallery]
    next_page_token: str | None


class Upserted(BaseModel):
    """What was written, and the gallery's version that has it. It is durable."""

    upserted: int
    version: int


class Deleted(BaseModel):
    """How many items were deleted, and which ids were not there."""

    deleted: int
    missing: list[str]


class ItemColumn(BaseModel):
    """One embedding of an item."""

    model: str
    origin: Literal["native", "derived"]
    transformation: str | None = Field(description="What made it, if it is derived.")
    lineage: list[LineageStep] = Field(description="Every transformation since a model made it; empty if it is native.")
    vector: list[float] | None = Field(default=None, description="With `include=vectors`.")


class StoredItem(BaseModel):
    """An item as it is stored."""

    id: str
    payload: dict[str, Any] | None
    columns: list[ItemColumn]
    side_information: list[float] | None = Field(default=None, description="With `include=vectors`, if it has some.")


class Probes(BaseModel):
    """How many probes the gallery has now."""

    probes: int


_ITEMS = {
    "model": "resnet18-v1",
    "items": [{"id": "img-17", "embedding": [0.1, 0.2, 0.3], "payload": {"category": "shoes", "price": 40}}],
}
_ARROW = {
    arrow.MEDIA_TYPE: {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": "An Arrow IPC stream with the columns `id` (string), `embedding` (list of floats, best of a fixed "
            "size), and optionally `side_information` (likewise, may be null) and `payload` (JSON text or struct). The "
            "model is named by the query parameter `model`, or in the schema's metadata under the key `model`.",
        }
    }
}
_PROBES = {"probes": [{"vectors": {"resnet18-v1": [0.1, 0.2], "resnet50-v2": [0.3, 0.4, 0.5]}, "relevant": ["img-17"]}]}


@router.post(
    "/galleries",
    status_code=201,
    **documented(
        errors.ModelNotFound,
        errors.GalleryExists,
        errors.InvalidIndex,
        takes=GalleryBody,
        example={"name": "photos", "model": "resnet18-v1"},
    ),
)
def create_gallery(
    caller: MayAdmin,
    _: RequestSlot,
    body: Annotated[GalleryBody, Depends(Json(GalleryBody))],
    process: ProcessDep,
    response: Response,
) -> Gallery:
    """Create a gallery for the vectors of a model."""
    try:
        check(body.index)
    except (ValueError, TypeError, ImportError) as error:
        raise errors.InvalidIndex(str(error), pointer="/index") from error

    def write() -> Gallery:
        with process.store.catalog.transaction() as tx:
            model = model_rows.model_row(tx.session, body.model, pointer="/model")
            row = gallery_rows.add_gallery(
                tx.session, name=body.name, model=model, index=body.index, storage_dtype=body.storage_dtype
            )
            upgrade_rows.record(tx.session, "gallery.created", gallery=body.name, actor=caller.name)
            return _gallery(tx.session, row)

    created = once_more(write)
    process.written()
    response.headers["Location"] = f"/galleries/{body.name}"
    return created


@router.get("/galleries", **documented())
def list_galleries(_: MaySearch, __: RequestSlot, page: PageDep, process: ProcessDep) -> Galleries:
    """List the galleries."""
    with process.store.catalog.reading() as session:
        rows, token = fetch(session, select(GalleryRow), GalleryRow.name, page)
        return Galleries(galleries=[_gallery(session, row) for row in rows], next_page_token=token)


@router.get("/galleries/{gallery}", **documented(errors.GalleryNotFound))
def get_gallery(_: MaySearch, __: RequestSlot, gallery: str, process: ProcessDep) -> Gallery:
    """Read a gallery: what it holds, per model, and how many bytes that takes."""
    with process.store.catalog.reading() as session:
        return _gallery(session, gallery_rows.gallery_row(session, gallery))


@router.delete("/galleries/{gallery}", status_code=204, **documented(errors.GalleryNotFound))
def delete_gallery(caller: MayAdmin, _: RequestSlot, gallery: str, process: ProcessDep) -> None:
    """Delete a gallery with all its items. Its upgrade is cancelled first."""
    lifecycle.delete_gallery(process.store, gallery, actor=caller.name)
    process.written()


@router.post("/admin/galleries/{gallery}/compact", status_code=202, **documented(errors.GalleryNotFound))
def compact_gallery(caller: MayAdmin, _: RequestSlot, gallery: str, process: ProcessDep) -> Gallery:
    """Merge all small segments and leave out deleted rows, as a worker does by itself once enough have piled up.

    The answer is the gallery as it stands; `segments` falls while a worker is at it. What an active upgrade has work for is
    left alone until that is over.
    """
    merge.ask(process.store, gallery, actor=caller.name)
    process.nudge()
    with process.store.catalog.reading() as session:
        return _gallery(session, gallery_rows.gallery_row(session, gallery))


async def _new_items(
    request: Request,
    process: ProcessDep,
    model: Annotated[str | None, Query(description="Of an Arrow stream; a JSON body names its own.")] = None,
) -> AsyncIterator[NewItems]:
    """The items of a JSON body or of an Arrow stream."""
    settings = process.store.settings
    if media_type(request) != arrow.MEDIA_TYPE:
        require_type(request, "application/json", arrow.MEDIA_TYPE)
        yield await Json(ItemsBody).made(request, process, lambda body: _from_json(body, process))
        return
    limit = process.settings.max_arrow_bytes
    async with uploads.spooled(request, process.store.files, limit, "max_arrow_bytes") as upload:
        yield await run_in_threadpool(
            arrow.read_items, upload.path, model=model, max_items=settings.max_items_per_arrow, max_bytes=2 * limit
        )


@router.post(
    "/galleries/{gallery}/items",
    **documented(
        errors.GalleryNotFound,
        errors.ModelNotFound,
        errors.NoRoute,
        errors.ModelRetired,
        errors.DimensionMismatch,
        errors.InvalidVector,
        errors.DuplicateId,
        errors.InvalidItem,
        errors.MissingSideInformation,
        errors.LimitExceeded,
        InvalidArrow,
        takes=ItemsBody,
        example=_ITEMS,
        other_content=_ARROW,
    ),
)
def upsert_items(
    _: MayWrite,
    __: RequestSlot,
    gallery: str,
    items: Annotated[NewItems, Depends(_new_items, scope="function")],
    process: ProcessDep,
) -> Upserted:
    """Write items; those whose id is there already are replaced. All or nothing: one bad item refuses the request."""
    try:
        done = ingest.upsert(process.store, gallery, items)
    except RecursionError:
        raise errors.InvalidItem("a payload is nested too deep") from None
    except errors.Invalid as error:
        raise _named(error, items.ids) from error
    process.metrics.upserted.inc(done.upserted)
    large = len(items.ids) >= process.store.settings.exact_below
    process.written(nudge=large or _is_upgraded(process, gallery))
    return Upserted(upserted=done.upserted, version=done.version)


@router.post(
    "/galleries/{gallery}/items/delete",
    **documented(errors.GalleryNotFound, errors.LimitExceeded, takes=IdsBody, example={"ids": ["img-17", "img-18"]}),
)
def delete_items(
    _: MayWrite, __: RequestSlot, gallery: str, body: Annotated[IdsBody, Depends(Json(IdsBody))], process: ProcessDep
) -> Deleted:
    """Delete items by id. Ids that are not there are reported, not refused."""
    within(len(body.ids), process.store.settings.max_items_per_upsert, "max_items_per_upsert", "/ids")
    possible = [item for item in body.ids if "\0" not in item]
    done = ingest.delete(process.store, gallery, possible)
    process.written()
    impossible = dict.fromkeys(item for item in body.ids if "\0" in item)
    return Deleted(deleted=done.deleted, missing=[*done.missing, *impossible])


@router.get("/galleries/{gallery}/items/{item:path}", **documented(errors.GalleryNotFound, errors.ItemNotFound))
def get_item(
    _: MaySearch,
    __: RequestSlot,
    gallery: str,
    item: str,
    process: ProcessDep,
    include: Annotated[list[Literal["vectors"]], Query()] = [],  # noqa: B006 - FastAPI copies it
) -> StoredItem:
    """Read an item: its payload, and which model or transformation made each of its embeddings."""
    view, found = _stored(process, gallery, item)
    columns = _columns(view, found.row, vectors="vectors" in include)
    side = view.side[found.row].tolist() if "vectors" in include and view.side is not None else None
    return StoredItem(id=item, payload=found.payload, columns=columns, side_information=side)


def _stored(process: Process, gallery: str, item: str) -> tuple[SegmentView, ItemRow]:
    """Where an item is, in the catalog and in the newest snapshot.

    Between the two reads the item's segment may have become part of a larger one; then both are read again.
    """
    for _ in range(_LOOKS):
        with process.store.catalog.reading() as session:
            row = gallery_rows.gallery_row(session, gallery)
            found = item_rows.live_item(session, row.id, item)
        snapshot = process.galleries.refresh().snapshot(gallery)
        view = next((view for view in snapshot.segments if view.id == found.segment_id), None)
        if view is not None:
            return view, found
    raise errors.ItemNotFound(f"the gallery has no item {item!r}")


@router.put(
    "/galleries/{gallery}/probes",
    **documented(
        errors.GalleryNotFound,
        errors.ModelNotFound,
        errors.DimensionMismatch,
        errors.InvalidVector,
        errors.LimitExceeded,
        takes=ProbesBody,
        example=_PROBES,
    ),
)
def put_probes(
    caller: MayWrite,
    _: RequestSlot,
    gallery: str,
    body: Annotated[ProbesBody, Depends(Json(ProbesBody))],
    process: ProcessDep,
) -> Probes:
    """Replace the gallery's probe queries, by which its upgrades are measured and gated."""
    within(len(body.probes), process.store.settings.max_queries, "max_queries", "/probes")
    with process.store.catalog.transaction() as tx:
        row = gallery_rows.gallery_row(tx.session, gallery)
        registry = model_rows.registry(tx.session)
        accepted = []
        for at, probe in enumerate(body.probes):
            vectors = {}
            for name, vector in probe.vectors.items():
                model = registry.models.get(name) or model_rows.as_model(
                    model_rows.model_row(tx.session, name, pointer=f"/probes/{at}/vectors/{name}")
                )
                vectors[name] = accept(vector.reshape(1, -1), model, pointer=f"/probes/{at}/vectors/{name}")[0]
            accepted.append((vectors, probe.relevant))
        quality.put_probes(tx.session, row.id, accepted)
        upgrade_rows.record(
            tx.session, "gallery.probes_replaced", gallery=gallery, actor=caller.name, probes=len(accepted)
        )
    return Probes(probes=len(accepted))


def _from_json(body: ItemsBody, process: Process) -> NewItems:
    """The items as arrays; each vector's width is checked here, where the item can be named."""
    within(len(body.items), process.store.settings.max_items_per_upsert, "max_items_per_upsert", "/items")
    model = process.seen(lambda world: world.model(body.model, pointer="/model"))
    ids = [item.id for item in body.items]
    try:
        embeddings = _stack([item.embedding for item in body.items], model.dimension, model.name, "embedding")
        side, has_side = _from_json_side(body, model)
    except errors.Invalid as error:
        raise _named(error, ids) from error
    payloads = [item.payload for item in body.items]
    while body.items:  # all of them freed at once would stop every thread for 20 ms
        del body.items[-_FREED_AT_ONCE:]
    return NewItems(body.model, ids, embeddings, payloads, side, has_side)


def _from_json_side(body: ItemsBody, model: EmbeddingModel) -> tuple[NDArray[Any] | None, NDArray[np.bool_] | None]:
    has_side = np.array([item.side_information is not None for item in body.items], dtype=np.bool_)
    if not has_side.any():
        return None, None
    # Where an item has none, an empty array keeps the place, so that a pointer counts in items.
    sides = [item.side_information for item in body.items]
    if model.side_dimension is None:
        raise errors.DimensionMismatch(
            f"{model.name} was registered without side-information, but this item has some",
            pointer=f"/items/{int(np.argmax(has_side))}/side_information",
        )
    return _stack(sides, model.side_dimension, f"{model.name}'s side-information", "side_information"), has_side


def _stack(vectors: Sequence[NDArray[Any] | None], dimension: int, model: str, field: str) -> NDArray[Any]:
    return stack(vectors, dimension, model, "/items/{row}/" + field)


def _named(error: errors.Invalid, ids: Sequence[str]) -> errors.Invalid:
    """The error, with the id of the item that its pointer leads to."""
    parts = (error.pointer or "").split("/")
    if len(parts) < 3 or parts[1] != "items" or int(parts[2]) >= len(ids):
        return error
    return type(error)(str(error), pointer=error.pointer, **{**error.details, "item": ids[int(parts[2])]})


def _is_upgraded(process: Process, gallery: str) -> bool:
    """Whether an upgrade waits for what was just written."""
    snapshot = process.galleries.current.galleries.get(gallery)
    if snapshot is None:
        return False
    with process.store.catalog.reading() as session:
        return upgrade_rows.active_of(session, snapshot.gallery_id) is not None


def _columns(view: SegmentView, row: int, *, vectors: bool) -> list[ItemColumn]:
    return [
        ItemColumn(
            model=name,
            origin=column.origin,
            transformation=column.lineage[-1].transformation if column.lineage else None,
            lineage=_steps(column.lineage),
            vector=column.vectors[row].tolist() if vectors else None,
        )
        for name, column in sorted(view.columns.items())
    ]


def _steps(lineage: Sequence[Step]) -> list[LineageStep]:
    return [
        LineageStep(
            transformation=step.transformation,
            artifact_sha256=step.artifact,
            source_model=step.source,
            source_origin="derived" if at else "native",
        )
        for at, step in enumerate(lineage)
    ]


def _gallery(session: Session, row: GalleryRow) -> Gallery:
    side_items, side_bytes = gallery_rows.side_information(session, row.id)
    indexes = segment_rows.indexes_of(session, row.id)
    lineages = segment_rows.lineages_of(session, row.id)
    active = upgrade_rows.active_of(session, row.id)
    return Gallery(
        name=row.name,
        model=row.model.name,
        items=gallery_rows.items_live(session, row.id),
        segments=gallery_rows.segments_of(session, row.id),
        version=row.version,
        storage_dtype=row.storage_dtype,
        index=row.index,
        columns=[
            _column(found, lineages.get(found["model"], {}), indexes.get(found["model"], []))
            for found in gallery_rows.models_of(session, row.id)
        ],
        side_information=StoredSideInformation(items=side_items, bytes=side_bytes),
        active_upgrade=active.id if active is not None else None,
        created_at=row.created_at,
    )


def _column(
    found: Mapping[str, Any], lineages: Mapping[tuple[Step, ...], int], measured: Sequence[Mapping[str, Any]]
) -> Column:
    return Column(
        model=found["model"],
        native_items=found["native_items"],
        derived_items=found["derived_items"],
        lineages=[
            Lineage(items=items, steps=_steps(lineage)) for lineage, items in sorted(lineages.items()) if lineage
        ],
        bytes=found["bytes"],
        index={
            "kind": found["index_kind"] or EXACT,
            "bytes": found["index_bytes"],
            MEASURED: min((each[MEASURED] for each in measured), default=None),
            "segments": measured,
        },
    )
