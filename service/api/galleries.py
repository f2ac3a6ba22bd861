"""Galleries, and the probe queries that measure them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery import errors, removal
from gallery.catalog import audit
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import models as model_rows
from gallery.catalog import probes as probe_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.holdings import Held, holdings
from gallery.catalog.segments import MEASURED
from gallery.catalog.tables import GalleryRow
from gallery.compact import merge
from gallery.index.choose import AUTO, EXACT, check
from gallery.index.registry import names
from gallery.vectors import accept
from service.auth import MayAdmin, MaySearch, MayWrite
from service.bodies import Body, ByModel, Reference, Text, parsed
from service.documents import documented
from service.lineages import LineageStep, steps
from service.names import Name
from service.paging import PageDep, fetch
from service.process import ProcessDep, RequestSlot, once_more

router = APIRouter(tags=["galleries"])


class GalleryBody(Body):
    """A gallery without items."""

    name: Name
    model: Reference
    index: dict[str, Any] = Field(
        default={"kind": "auto"},
        description=f"`kind` is one of {', '.join((AUTO, *names()))}; the rest are parameters of that kind.",
    )
    storage_dtype: Literal["float32", "float16"] = "float32"


class Probe(Body):
    """A query with its vector in each model, and the ids that are relevant to it, if they are known."""

    vectors: ByModel = Field(min_length=1)
    relevant: Annotated[list[Text], Field(fail_fast=True)] | None = None


class ProbesBody(Body):
    """Probe queries; they replace the present ones."""

    limits: ClassVar = {"probes": "max_queries"}

    probes: list[Probe]


class StoredSideInformation(BaseModel):
    """How much side-information is stored."""

    items: int
    bytes: int


class Lineage(BaseModel):
    """How derived vectors were made, and for how many live items."""

    items: int
    steps: list[LineageStep] = Field(description="The oldest first; it starts at a native column.")


class Column(BaseModel):
    """What is stored for one model."""

    model: str
    native_items: int = Field(description="Live items that the model itself embedded.")
    derived_items: int = Field(description="Live items whose vector came out of a transformation.")
    lineages: list[Lineage] = Field(description="How the derived vectors were made.")
    bytes: int
    index: dict[str, Any] = Field(
        description="`kind` of the index files, and their `bytes`; `segments` whose recall was measured, each with its "
        "`kind`, parameters and `recall_at_10`; and as `recall_at_10` the smallest of theirs, null where there is none."
    )


class Gallery(BaseModel):
    """The present state of a gallery."""

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


class Probes(BaseModel):
    """How many probes the gallery has now."""

    probes: int


_PROBES = {"probes": [{"vectors": {"resnet18-v1": [0.1, 0.2], "resnet50-v2": [0.3, 0.4, 0.5]}, "relevant": ["img-17"]}]}


@router.post(
    "/galleries",
    status_code=201,
    **documented(
        errors.ModelNotFound,
        errors.GalleryExists,
        errors.InvalidIndex,
        takes=GalleryBody,
        located=201,
        example={"name": "photos", "model": "resnet18-v1"},
    ),
)
def create_gallery(
    caller: MayAdmin,
    body: Annotated[GalleryBody, parsed(GalleryBody)],
    process: ProcessDep,
    response: Response,
    _: RequestSlot,
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
            audit.record(tx.session, "gallery.created", gallery=body.name, actor=caller.name)
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
        return Galleries(galleries=_galleries(session, rows), next_page_token=token)


@router.get("/galleries/{gallery}", **documented(errors.GalleryNotFound))
def get_gallery(_: MaySearch, __: RequestSlot, gallery: str, process: ProcessDep) -> Gallery:
    """Read a gallery: what it holds, per model, and how many bytes that takes."""
    with process.store.catalog.reading() as session:
        return _gallery(session, gallery_rows.gallery_row(session, gallery))


@router.delete("/galleries/{gallery}", status_code=204, **documented(errors.GalleryNotFound))
def delete_gallery(caller: MayAdmin, _: RequestSlot, gallery: str, process: ProcessDep) -> None:
    """Delete a gallery with all its items. Its upgrade is cancelled first."""
    removal.delete_gallery(process.store, gallery, actor=caller.name)
    process.written()


@router.post("/admin/galleries/{gallery}/compact", status_code=202, **documented(errors.GalleryNotFound))
def compact_gallery(caller: MayAdmin, _: RequestSlot, gallery: str, process: ProcessDep) -> Gallery:
    """Merge all small segments and remove deleted rows, as a worker does by itself once there are enough of them.

    The answer is the present state of the gallery; `segments` falls while a worker merges. What an active upgrade has work for is
    left alone until that is over.
    """
    merge.ask(process.store, gallery, actor=caller.name)
    process.nudge()
    with process.store.catalog.reading() as session:
        return _gallery(session, gallery_rows.gallery_row(session, gallery))


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
    gallery: str,
    body: Annotated[ProbesBody, parsed(ProbesBody)],
    process: ProcessDep,
    _: RequestSlot,
) -> Probes:
    """Replace the gallery's probe queries, which measure the quality of its upgrades and decide their gates."""
    with process.store.catalog.transaction() as tx:
        row = gallery_rows.gallery_row(tx.session, gallery)
        registry = model_rows.registry(tx.session)
        accepted = []
        for at, probe in enumerate(body.probes):
            vectors = {}
            for name, vector in probe.vectors.items():
                place = errors.pointer("probes", at, "vectors", name)
                model = registry.models.get(name) or model_rows.as_model(
                    model_rows.model_row(tx.session, name, pointer=place)
                )
                vectors[name] = accept(vector.reshape(1, -1), model, pointer=place)[0]
            accepted.append((vectors, probe.relevant))
        # Probes are replaced by one client after the other, and not while the gallery is deleted.
        gallery_rows.lock(tx.session, row.id)
        probe_rows.replace(tx.session, row.id, accepted)
        audit.record(tx.session, "gallery.probes_replaced", gallery=gallery, actor=caller.name, probes=len(accepted))
    return Probes(probes=len(accepted))


def _galleries(session: Session, rows: Sequence[GalleryRow]) -> list[Gallery]:
    ids = [row.id for row in rows]
    found, active = holdings(session, ids), upgrade_rows.active_in(session, ids)
    return [
        Gallery(
            name=row.name,
            model=row.model.name,
            items=found[row.id].items,
            segments=found[row.id].segments,
            version=row.version,
            storage_dtype=row.storage_dtype,
            index=row.index,
            columns=[_column(model, held) for model, held in found[row.id].models.items()],
            side_information=StoredSideInformation(items=found[row.id].side_items, bytes=found[row.id].side_bytes),
            active_upgrade=active.get(row.id),
            created_at=row.created_at,
        )
        for row in rows
    ]


def _gallery(session: Session, row: GalleryRow) -> Gallery:
    return _galleries(session, [row])[0]


def _column(model: str, held: Held) -> Column:
    return Column(
        model=model,
        native_items=held.native_items,
        derived_items=held.derived_items,
        lineages=[
            Lineage(items=items, steps=steps(lineage)) for lineage, items in sorted(held.lineages.items()) if lineage
        ],
        bytes=held.bytes,
        index={
            "kind": held.index_kind or EXACT,
            "bytes": held.index_bytes,
            MEASURED: min((each[MEASURED] for each in held.measured), default=None),
            "segments": held.measured,
        },
    )
