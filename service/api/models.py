"""Models, and transformations that are registered with one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field, StringConstraints
from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery import errors
from gallery.catalog import audit
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import models as model_rows
from gallery.catalog.models import NewModel
from gallery.catalog.tables import ModelRow
from service.api.transformations import SideInformation, TransformationBody, add_transformation
from service.auth import MayAdmin, MaySearch
from service.bodies import NO_NUL, Body, parsed, within
from service.documents import documented
from service.names import Name
from service.paging import PageDep, fetch
from service.process import ProcessDep, RequestSlot, once_more

router = APIRouter()

Metric = Literal["cosine", "inner_product", "euclidean"]


class ModelBody(Body):
    """A model version: it defines one embedding space."""

    name: Name
    dimension: int = Field(ge=1)
    metric: Metric
    normalized: bool = False
    side_information: SideInformation | None = None
    fingerprint: Annotated[str, StringConstraints(max_length=512), NO_NUL] | None = Field(
        default=None,
        description="Of weights, preprocessing and normalisation: whatever makes its vectors.",
    )
    description: Annotated[str, StringConstraints(max_length=4096), NO_NUL] | None = None
    transformations: list[TransformationBody] = Field(
        default=[], max_length=100, description="Registered in the same transaction."
    )


class Model(BaseModel):
    """A registered model, and who uses it."""

    name: str
    dimension: int
    metric: Metric
    normalized: bool
    side_information: SideInformation | None
    fingerprint: str | None
    description: str | None
    created_at: datetime
    galleries: list[str]
    transformations: list[str]


class Models(BaseModel):
    """A page of models, in the order of their names."""

    models: list[Model]
    next_page_token: str | None


_MODEL = {"name": "resnet50-v2", "dimension": 128, "metric": "cosine", "normalized": True, "fingerprint": "sha256:5d0c"}


@router.post(
    "/models",
    status_code=201,
    tags=["models"],
    **documented(
        errors.ModelExists,
        errors.ModelNotFound,
        errors.ArtifactNotFound,
        errors.TransformationExists,
        errors.WrongTransformation,
        errors.LimitExceeded,
        takes=ModelBody,
        located=201,
        example=_MODEL,
        already=Model,
    ),
)
def register_model(
    caller: MayAdmin,
    body: Annotated[ModelBody, parsed(ModelBody)],
    process: ProcessDep,
    response: Response,
    _: RequestSlot,
) -> Model:
    """Register a model, and transformations with it: all or nothing. 200 if this very definition is there already."""
    side = None if body.side_information is None else body.side_information.dimension
    for dimension, at in ((body.dimension, "/dimension"), (side or 1, "/side_information/dimension")):
        within(dimension, process.store.settings.max_dimension, "max_dimension", at)
    new = NewModel(
        name=body.name,
        dimension=body.dimension,
        metric=body.metric,
        normalized=body.normalized,
        side_dimension=side,
        fingerprint=body.fingerprint,
        description=body.description,
    )

    def write() -> tuple[bool, Model]:
        with process.store.catalog.transaction() as tx:
            created = model_rows.add_model(tx.session, new)
            if created:
                audit.record(tx.session, "model.registered", actor=caller.name, model=new.name)
            for at, transformation in enumerate(body.transformations):
                add_transformation(tx.session, transformation, caller.name, f"/transformations/{at}")
            return created, _model(tx.session, model_rows.model_row(tx.session, new.name))

    created, model = once_more(write)
    process.written()
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/models/{new.name}"
    return model


@router.get("/models", tags=["models"], **documented())
def list_models(_: MaySearch, __: RequestSlot, page: PageDep, process: ProcessDep) -> Models:
    """List the registered models."""
    with process.store.catalog.reading() as session:
        rows, token = fetch(session, select(ModelRow), ModelRow.name, page)
        return Models(models=_models(session, rows), next_page_token=token)


@router.get("/models/{model}", tags=["models"], **documented(errors.ModelNotFound))
def get_model(_: MaySearch, __: RequestSlot, model: str, process: ProcessDep) -> Model:
    """Read a model, with the galleries and transformations that use it."""
    with process.store.catalog.reading() as session:
        return _model(session, model_rows.model_row(session, model))


def _models(session: Session, rows: Sequence[ModelRow]) -> list[Model]:
    ids = [row.id for row in rows]
    galleries, transformations = gallery_rows.of_models(session, ids), model_rows.transformations_of(session, ids)
    return [
        Model(
            name=row.name,
            dimension=row.dimension,
            metric=row.metric,
            normalized=row.normalized,
            side_information=None if row.side_dimension is None else SideInformation(dimension=row.side_dimension),
            fingerprint=row.fingerprint,
            description=row.description,
            created_at=row.created_at,
            galleries=galleries[row.id],
            transformations=transformations[row.id],
        )
        for row in rows
    ]


def _model(session: Session, row: ModelRow) -> Model:
    return _models(session, [row])[0]
