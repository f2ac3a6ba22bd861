"""Items of a gallery: written, deleted, read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from fastapi import APIRouter, Depends, Query, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from gallery import errors
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import items as item_rows
from gallery.catalog.tables import ItemRow
from gallery.new_items import NewItems
from gallery.spaces import EmbeddingModel
from gallery.views import SegmentView
from service import arrow, uploads
from service.api.search import as_json
from service.auth import MaySearch, MayWrite
from service.bodies import Body, Json, Reference, Vector, media_type, parsed, require_type, stack
from service.documents import documented
from service.errors import InvalidArrow, named
from service.lineages import LineageStep, steps
from service.process import Process, ProcessDep, RequestSlot

router = APIRouter(tags=["galleries"])
_FREED_AT_ONCE = 256
_LOOKS = 5  # for an item; merges of its segment cannot follow each other faster than that


class Item(Body):
    """An item, embedded by one model."""

    id: str = Field(description="1 to 512 bytes of text without control characters; not `.` or `..`.")
    embedding: Vector
    side_information: Vector | None = None
    payload: dict[str, Any] | None = None


class ItemsBody(Body):
    """Items of one model."""

    limits: ClassVar = {"items": "max_items_per_upsert"}

    model: Reference
    items: list[Item]


class IdsBody(Body):
    """Items by their ids."""

    limits: ClassVar = {"ids": "max_items_per_upsert"}

    ids: list[str]


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
    transformation: str | None = Field(description="The transformation that made it, if it is derived.")
    lineage: list[LineageStep] = Field(description="Every transformation since a model made it; empty if it is native.")
    vector: list[float] | None = Field(default=None, description="With `include=vectors`.")


class StoredItem(BaseModel):
    """An item as it is stored."""

    id: str
    payload: dict[str, Any] | None
    columns: list[ItemColumn]
    side_information: list[float] | None = Field(
        default=None, description="With `include=vectors`, if it has side-information."
    )


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
        },
        "example": "(binary) id: string, embedding: fixed_size_list<float>[512], side_information: "
        "fixed_size_list<float>[64], payload: string; metadata: model=resnet18-v1; 1000 rows",
    }
}


async def _new_items(
    request: Request,
    process: ProcessDep,
    model: Annotated[str | None, Query(description="Of an Arrow stream; a JSON body names its own.")] = None,
) -> AsyncIterator[NewItems]:
    """The items of a JSON body or of an Arrow stream."""
    settings = process.store.settings
    if media_type(request) != arrow.MEDIA_TYPE:
        require_type(request, "application/json", arrow.MEDIA_TYPE)
        async with Json(ItemsBody).made(request, process, lambda body: _from_json(body, process)) as items:
            yield items
        return
    limit = process.settings.max_arrow_bytes
    async with uploads.spooled(request, process, limit, "max_arrow_bytes") as upload:
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
        errors.Conflict,
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
    gallery: str,
    items: Annotated[NewItems, Depends(_new_items, scope="function")],
    process: ProcessDep,
    __: RequestSlot,
) -> Upserted:
    """Write items. Items with an existing id are replaced. All or nothing: one bad item refuses the request."""
    try:
        done = process.group_commit.upsert(gallery, items)
    except errors.Invalid as error:
        raise named(error, items.ids) from error
    process.metrics.counts.upserted(done.upserted)
    large = len(items.ids) >= process.store.settings.exact_below
    process.written(nudge=large or done.queued)
    return Upserted(upserted=done.upserted, version=done.version)


@router.post(
    "/galleries/{gallery}/items/delete",
    **documented(errors.GalleryNotFound, errors.LimitExceeded, takes=IdsBody, example={"ids": ["img-17", "img-18"]}),
)
def delete_items(
    _: MayWrite,
    gallery: str,
    body: Annotated[IdsBody, parsed(IdsBody)],
    process: ProcessDep,
    __: RequestSlot,
) -> Deleted:
    """Delete items by id. Unknown ids are reported, not refused."""
    possible = [item for item in body.ids if "\0" not in item]
    done = process.group_commit.delete(gallery, possible)
    process.written()
    impossible = dict.fromkeys(item for item in body.ids if "\0" in item)
    return Deleted(deleted=done.deleted, missing=[*done.missing, *impossible])


@router.get(
    "/galleries/{gallery}/items/{item:path}",
    response_model=StoredItem,
    **documented(errors.GalleryNotFound, errors.ItemNotFound),
)
def get_item(
    _: MaySearch,
    __: RequestSlot,
    gallery: str,
    item: str,
    process: ProcessDep,
    include: Annotated[list[Literal["vectors"]], Query()] = [],  # noqa: B006 - FastAPI copies it
) -> Response:
    """Read an item: its payload, and which model or transformation made each of its embeddings."""
    view, found = _stored(process, gallery, item)
    columns = _columns(view, found.row, vectors="vectors" in include)
    side = view.side[found.row].tolist() if "vectors" in include and view.side is not None else None
    about = {"columns": [each.model_dump() for each in columns], "side_information": side}
    return as_json({"id": item, "payload": found.payload, **about})


def _stored(process: Process, gallery: str, item: str) -> tuple[SegmentView, ItemRow]:
    """Where an item is, in the catalog and in a snapshot.

    What is in memory has most items. Where it lacks the item's segment, as when that has just become part of a larger one, both
    are read again.
    """
    world = process.catch_up.world()
    for _ in range(_LOOKS):
        with process.store.catalog.reading() as session:
            row = gallery_rows.gallery_row(session, gallery)
            found = item_rows.live_item(session, row.id, item)
        with suppress(errors.GalleryNotFound):  # another process has just made it
            segments = world.snapshot(gallery).segments
            if (view := next((view for view in segments if view.id == found.segment_id), None)) is not None:
                return view, found
        world = process.galleries.refresh()
    raise errors.ItemNotFound(f"the gallery has no item {item!r}")


def _from_json(body: ItemsBody, process: Process) -> NewItems:
    """The items as arrays; each vector's width is checked here, where the item can be named."""
    model = process.seen(lambda world: world.model(body.model, pointer="/model"))
    ids = [item.id for item in body.items]
    try:
        embeddings = _stack([item.embedding for item in body.items], model.dimension, model.name, "embedding")
        side, has_side = _from_json_side(body, model)
    except errors.Invalid as error:
        raise named(error, ids) from error
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


def _columns(view: SegmentView, row: int, *, vectors: bool) -> list[ItemColumn]:
    return [
        ItemColumn(
            model=name,
            origin=column.origin,
            transformation=column.lineage[-1].transformation if column.lineage else None,
            lineage=steps(column.lineage),
            vector=column.vectors[row].tolist() if vectors else None,
        )
        for name, column in sorted(view.columns.items())
    ]
