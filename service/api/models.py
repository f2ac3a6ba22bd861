"""Models, artifacts and transformations."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from gallery import errors
from gallery.catalog import audit, claims
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import models as model_rows
from gallery.catalog.models import NewModel, NewTransformation
from gallery.catalog.tables import ArtifactRow, ModelRow, TransformationRow, now
from gallery.spaces import EmbeddingModel
from gallery.transforms import artifact_file
from gallery.upgrade.known_answers import Tried, compared
from gallery.vectors import accept, accept_side
from models.evaluation import evaluate_pairs
from service import uploads
from service.auth import MayAdmin, MaySearch
from service.bodies import Body, Name, Reference, Text, TransformationName, Vector, parsed, stack, within
from service.documents import documented
from service.paging import PageDep, fetch
from service.process import Process, ProcessDep, RequestSlot, once_more

router = APIRouter()

Direction = Literal["forward", "backward"]
Metric = Literal["cosine", "inner_product", "euclidean"]
Sha256 = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the file, in lowercase hexadecimal.")]


class SideInformation(Body):
    """The auxiliary vector that is stored with each item for future upgrades."""

    dimension: int = Field(ge=1)


class TransformationBody(Body):
    """A transformation between two registered models."""

    name: TransformationName
    source: Reference
    target: Reference
    direction: Direction = Field(
        description="forward: old to new, for the gallery; backward: new to old, for the query."
    )
    method: Name = Field(description="How it was made, such as `fct`.")
    artifact: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of an uploaded artifact.")


class ModelBody(Body):
    """A model version: it defines one embedding space."""

    name: Name
    dimension: int = Field(ge=1)
    metric: Metric
    normalized: bool = False
    side_information: SideInformation | None = None
    fingerprint: Text | None = Field(
        default=None,
        max_length=512,
        description="Of weights, preprocessing and normalisation: whatever makes its vectors.",
    )
    description: Text | None = Field(default=None, max_length=4096)
    transformations: list[TransformationBody] = Field(
        default=[], max_length=100, description="Registered in the same transaction."
    )


class EvaluationBody(Body):
    """A paired sample: the same items embedded by both models."""

    source_embeddings: list[Vector] = Field(min_length=1)
    target_embeddings: list[Vector] = Field(min_length=1)
    side_information: list[Vector] | None = None
    labels: list[int | str] | None = None


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


class Artifact(BaseModel):
    """A stored artifact."""

    sha256: str
    bytes: int
    architecture: dict[str, Any]
    created_at: datetime


class Transformation(BaseModel):
    """A registered transformation, with its evaluation if it was measured."""

    name: str
    source: str
    target: str
    direction: Direction
    method: str
    artifact: str
    side_information: SideInformation | None = Field(description="What it needs; null if nothing.")
    evaluation: dict[str, Any] | None
    created_at: datetime


class Transformations(BaseModel):
    """A page of transformations, in the order of their names."""

    transformations: list[Transformation]
    next_page_token: str | None


_MODEL = {"name": "resnet50-v2", "dimension": 128, "metric": "cosine", "normalized": True, "fingerprint": "sha256:5d0c"}
_SAFETENSORS = {
    "application/octet-stream": {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": "A safetensors file whose metadata declares a `format` and an `architecture` of the closed list.",
        },
        "example": "(binary) weight: float32 (128, 512), bias: float32 (128); metadata: format=forwardfill.transformation/1, "
        'architecture={"kind": "linear", "source_dimension": 512, "target_dimension": 128}',
    }
}
_TRANSFORMATION = {
    "name": "r18-to-r50",
    "source": "resnet18-v1",
    "target": "resnet50-v2",
    "direction": "forward",
    "method": "fct",
    "artifact": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
}


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
                _add_transformation(tx.session, transformation, caller.name, f"/transformations/{at}")
            return created, _model(tx.session, model_rows.model_row(tx.session, new.name))

    created, model = once_more(write)
    process.written()
    _created(response, f"/models/{new.name}", created=created)
    return model


@router.get("/models", tags=["models"], **documented())
def list_models(_: MaySearch, __: RequestSlot, page: PageDep, process: ProcessDep) -> Models:
    """List the registered models."""
    with process.store.catalog.reading() as session:
        rows, token = fetch(session, select(ModelRow), ModelRow.name, page)
        return Models(models=[_model(session, row) for row in rows], next_page_token=token)


@router.get("/models/{model}", tags=["models"], **documented(errors.ModelNotFound))
def get_model(_: MaySearch, __: RequestSlot, model: str, process: ProcessDep) -> Model:
    """Read a model, with the galleries and transformations that use it."""
    with process.store.catalog.reading() as session:
        return _model(session, model_rows.model_row(session, model))


@router.put(
    "/artifacts/{sha256}",
    status_code=201,
    tags=["transformations"],
    **documented(
        errors.DigestMismatch,
        errors.UnsafeArtifact,
        already=Artifact,
        other_content=_SAFETENSORS,
    ),
)
async def put_artifact(
    caller: MayAdmin, sha256: Sha256, request: Request, process: ProcessDep, response: Response
) -> Artifact:
    """Store a safetensors file of a declared architecture under its digest. 200 if it is there already.

    The file is not trusted: nothing is unpickled, and its tensors must be exactly those that its architecture
    implies. The media type is ignored.
    """
    async with uploads.spooled(request, process, process.settings.max_artifact_bytes, "max_artifact_bytes") as upload:
        if upload.sha256 != sha256:
            raise errors.DigestMismatch(f"the body's SHA-256 is {upload.sha256}, not {sha256}", sha256=upload.sha256)
        async with process.requests.taken():
            architecture = await run_in_threadpool(uploads.judged, upload.path)
            created, artifact = await run_in_threadpool(_keep, process, upload, architecture, caller.name)
    _created(response, None, created=created)
    return artifact


@router.post(
    "/transformations",
    status_code=201,
    tags=["transformations"],
    **documented(
        errors.ModelNotFound,
        errors.ArtifactNotFound,
        errors.TransformationExists,
        errors.WrongTransformation,
        takes=TransformationBody,
        located=201,
        example=_TRANSFORMATION,
        already=Transformation,
    ),
)
def register_transformation(
    caller: MayAdmin,
    body: Annotated[TransformationBody, parsed(TransformationBody)],
    process: ProcessDep,
    response: Response,
    _: RequestSlot,
) -> Transformation:
    """Register a transformation; its artifact must fit both models. 200 if this very definition is there already."""

    def write() -> tuple[bool, Transformation]:
        with process.store.catalog.transaction() as tx:
            created = _add_transformation(tx.session, body, caller.name)
            return created, _transformation(model_rows.transformation_row(tx.session, body.name))

    created, transformation = once_more(write)
    process.written()
    _created(response, f"/transformations/{body.name}", created=created)
    return transformation


@router.get("/transformations", tags=["transformations"], **documented())
def list_transformations(_: MaySearch, __: RequestSlot, page: PageDep, process: ProcessDep) -> Transformations:
    """List the registered transformations."""
    with process.store.catalog.reading() as session:
        rows, token = fetch(session, select(TransformationRow), TransformationRow.name, page)
        return Transformations(transformations=[_transformation(row) for row in rows], next_page_token=token)


@router.get("/transformations/{transformation}", tags=["transformations"], **documented(errors.TransformationNotFound))
def get_transformation(_: MaySearch, __: RequestSlot, transformation: str, process: ProcessDep) -> Transformation:
    """Read a transformation, with its evaluation."""
    with process.store.catalog.reading() as session:
        return _transformation(model_rows.transformation_row(session, transformation))


@router.post(
    "/transformations/{transformation}/evaluate",
    tags=["transformations"],
    **documented(
        errors.TransformationNotFound,
        errors.DimensionMismatch,
        errors.InvalidVector,
        errors.MissingSideInformation,
        errors.LimitExceeded,
        takes=EvaluationBody,
        example={"source_embeddings": [[0.1, 0.2]], "target_embeddings": [[0.3, 0.4, 0.5]], "labels": [7]},
    ),
)
def evaluate(
    _: MayAdmin,
    transformation: str,
    body: Annotated[EvaluationBody, parsed(EvaluationBody)],
    process: ProcessDep,
    __: RequestSlot,
) -> Transformation:
    """Measure a transformation on a paired sample, and keep the result with it.

    Queries are the target embeddings, the gallery is the transformed ones, each item is left out of its own ranking.
    """
    with process.store.catalog.reading() as session:
        row = model_rows.transformation_row(session, transformation)
        source, target = model_rows.as_model(row.source), model_rows.as_model(row.target)
        known = model_rows.as_transformation(row)
    _check_pairs(body, process)
    embeddings = _matrix(body.source_embeddings, source, "/source_embeddings/{row}")
    wanted = _matrix(body.target_embeddings, target, "/target_embeddings/{row}")
    labels = None if body.labels is None else np.unique([str(each) for each in body.labels], return_inverse=True)[1]
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is null in the answer
        mapped = process.store.transforms.apply(known, target, embeddings, _side(body, known.side_dimension, source))
        measured = evaluate_pairs(mapped, wanted, labels, metric=target.metric)
        answers = compared(Tried(mapped), embeddings, wanted)  # by which an upgrade will judge the transformation
    with process.store.catalog.transaction() as tx:
        row = model_rows.transformation_row(tx.session, transformation)
        verdict = (row.evaluation or {}).get("verdict")
        row.evaluation = {
            **measured,
            **({} if verdict is None else {"verdict": verdict}),  # of the fit, which stands
            "known_answers": answers,
            "pairs": len(embeddings),
            "at": now().isoformat().replace("+00:00", "Z"),
        }
        tx.session.flush()
        return _transformation(row)


def _add_transformation(session: Session, body: TransformationBody, actor: str | None, at: str = "") -> bool:
    """Register one that stands `at` a place of the request, which is where a refusal points then."""
    try:
        created = model_rows.add_transformation(session, NewTransformation(**body.model_dump()))
    except errors.GalleryError as error:
        error.pointer = at + (error.pointer or "")
        raise
    if created:
        audit.record(
            session, "transformation.registered", actor=actor, transformation=body.name, artifact=body.artifact
        )
    return created


def _keep(
    process: Process, upload: uploads.Upload, architecture: dict[str, Any], actor: str | None
) -> tuple[bool, Artifact]:
    """The file first, then the row that names it."""
    uploads.keep(process.store.files, upload, artifact_file(upload.sha256))

    def write() -> tuple[bool, Artifact]:
        with process.store.catalog.transaction() as tx:
            claims.hold(tx.session)
            process.store.files.claim([artifact_file(upload.sha256)])
            created = model_rows.add_artifact(tx.session, upload.sha256, size=upload.size, architecture=architecture)
            if created:
                audit.record(tx.session, "artifact.stored", actor=actor, artifact=upload.sha256)
            row = tx.session.get_one(ArtifactRow, upload.sha256)
            return created, Artifact.model_validate(row, from_attributes=True)

    return once_more(write)


def _check_pairs(body: EvaluationBody, process: Process) -> None:
    pairs = len(body.source_embeddings)
    within(pairs, process.store.settings.max_items_per_upsert, "max_items_per_upsert", "/source_embeddings")
    for name in ("target_embeddings", "side_information", "labels"):
        given = getattr(body, name)
        if given is not None and len(given) != pairs:
            raise errors.DimensionMismatch(f"{pairs} source_embeddings, but {len(given)} {name}", pointer=f"/{name}")


def _matrix(vectors: list[Any], model: EmbeddingModel, at: str) -> Any:
    return accept(stack(vectors, model.dimension, model.name, at), model, pointer=at)


def _side(body: EvaluationBody, needed: int | None, source: EmbeddingModel) -> Any:
    if needed is None:
        return None
    if body.side_information is None:
        raise errors.MissingSideInformation(
            f"this transformation needs side-information of dimension {needed}", pointer="/side_information"
        )
    at = "/side_information/{row}"
    return accept_side(
        stack(body.side_information, needed, f"{source.name}'s side-information", at), needed, pointer=at
    )


def _model(session: Session, row: ModelRow) -> Model:
    return Model(
        name=row.name,
        dimension=row.dimension,
        metric=model_rows.as_model(row).metric,
        normalized=row.normalized,
        side_information=None if row.side_dimension is None else SideInformation(dimension=row.side_dimension),
        fingerprint=row.fingerprint,
        description=row.description,
        created_at=row.created_at,
        galleries=gallery_rows.of_model(session, row.id),
        transformations=model_rows.transformations_of(session, row.id),
    )


def _transformation(row: TransformationRow) -> Transformation:
    known = model_rows.as_transformation(row)
    return Transformation(
        name=known.name,
        source=known.source,
        target=known.target,
        direction=known.direction,
        method=known.method,
        artifact=known.artifact,
        side_information=None if known.side_dimension is None else SideInformation(dimension=known.side_dimension),
        evaluation=dict(known.evaluation) if known.evaluation is not None else None,
        created_at=known.created_at,
    )


def _created(response: Response, location: str | None, *, created: bool) -> None:
    response.status_code = 201 if created else 200
    if location is not None:
        response.headers["Location"] = location
