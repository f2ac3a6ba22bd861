"""Transformations: registered, read, and measured on a paired sample."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery import errors
from gallery.catalog import audit
from gallery.catalog import models as model_rows
from gallery.catalog.models import NewTransformation
from gallery.catalog.tables import TransformationRow, now, rfc3339
from gallery.spaces import EmbeddingModel
from gallery.upgrade.known_answers import Tried, compared
from gallery.vectors import accept, accept_side
from models.evaluation import evaluate_pairs
from service.auth import MayAdmin, MaySearch
from service.bodies import Body, Label, Reference, Vector, parsed, stack
from service.documents import documented
from service.names import Name, TransformationName
from service.paging import PageDep, fetch
from service.process import ProcessDep, RequestSlot, once_more

router = APIRouter()

Direction = Literal["forward", "backward"]


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


class EvaluationBody(Body):
    """A paired sample: the same items embedded by both models."""

    limits: ClassVar = dict.fromkeys(
        ("source_embeddings", "target_embeddings", "side_information", "labels"), "max_items_per_upsert"
    )

    source_embeddings: list[Vector] = Field(min_length=1)
    target_embeddings: list[Vector] = Field(min_length=1)
    side_information: list[Vector] | None = None
    labels: list[Label] | None = None


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


_TRANSFORMATION = {
    "name": "r18-to-r50",
    "source": "resnet18-v1",
    "target": "resnet50-v2",
    "direction": "forward",
    "method": "fct",
    "artifact": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
}


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
            created = add_transformation(tx.session, body, caller.name)
            return created, _transformation(model_rows.transformation_row(tx.session, body.name))

    created, transformation = once_more(write)
    process.written()
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/transformations/{body.name}"
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
    _check_pairs(body)
    embeddings = _matrix(body.source_embeddings, source, "/source_embeddings/{row}")
    wanted = _matrix(body.target_embeddings, target, "/target_embeddings/{row}")
    labels = None if body.labels is None else np.unique([str(each) for each in body.labels], return_inverse=True)[1]
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is null in the answer
        mapped = process.store.transforms.apply(known, target, embeddings, _side(body, known.side_dimension, source))
        measured = evaluate_pairs(mapped, wanted, labels, metric=target.metric)
        # By these an upgrade will judge the transformation.
        answers = compared(Tried(mapped), embeddings, wanted, metric=target.metric)
    with process.store.catalog.transaction() as tx:
        row = model_rows.transformation_row(tx.session, transformation)
        verdict = (row.evaluation or {}).get("verdict")
        row.evaluation = {
            **measured,
            **({} if verdict is None else {"verdict": verdict}),  # of the fit, which stands
            "known_answers": answers,
            "pairs": len(embeddings),
            "at": rfc3339(now()),
        }
        tx.session.flush()
        return _transformation(row)


def add_transformation(session: Session, body: TransformationBody, actor: str | None, at: str = "") -> bool:
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


def _check_pairs(body: EvaluationBody) -> None:
    pairs = len(body.source_embeddings)
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
