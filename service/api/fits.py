"""Fits: a transformation is trained inside the service, from items of a gallery and their vectors by the new model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from gallery import errors, fits
from gallery.catalog import fits as fit_rows
from gallery.catalog.tables import FitRow
from gallery.fits import NewFit
from gallery.pairs import NewPairs
from models.inputs import MIN_PAIRS
from service import arrow, uploads
from service.auth import MayAdmin
from service.bodies import (
    Body,
    Json,
    Label,
    Reference,
    Vector,
    media_type,
    require_type,
    stack,
)
from service.documents import documented
from service.errors import InvalidArrow, invalid
from service.idempotency import IdempotencyKey, fingerprint
from service.names import TransformationName
from service.paging import PageDep, fetch
from service.process import Process, ProcessDep, RequestSlot, once_more

router = APIRouter(prefix="/transformations", tags=["transformations"])

#: `auto`, or a key of METHODS that pairs are enough for; a test holds the two together, since importing them takes seconds
Method = Literal[
    "auto",
    "fct",
    "fastfill",
    "xbt",
    "procrustes",
    "affine",
    "low_rank",
    "residual_mlp",
    "l2",
    "lambda_orthogonality",
]
Direction = Literal["forward", "backward"]
State = Literal["pending", "running", "completed", "failed", "cancelled"]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]


class Pair(Body):
    """An item of the gallery, embedded by the target model."""

    id: Reference
    embedding: Vector
    label: Label | None = Field(default=None, description="Items of one label are relevant to each other.")


class FitOptions(Body):
    """What to fit."""

    gallery: Reference = Field(description="Which items the ids name; its model is the source.")
    name: TransformationName = Field(description="Of the transformation that will be registered.")
    target: Reference = Field(description="The model that embedded the pairs.")
    method: Method = Field(
        default="auto", description="`auto` tries every method and keeps the best. This is expensive."
    )
    direction: Direction = "forward"
    seed: Seed = 0
    use_side_information: bool | None = Field(
        default=None, description="Also use the items' side-information; null uses it if all items have it."
    )


class FitBody(FitOptions):
    """What to fit, and to which pairs."""

    limits: ClassVar = {"pairs": "max_fit_pairs"}

    pairs: list[Pair] = Field(min_length=1, description="Label all items, or none.")


class FitQuery(BaseModel):
    """The same for an Arrow stream of pairs; a JSON body says all of it itself."""

    gallery: Reference | None = None
    name: TransformationName | None = None
    target: Reference | None = None
    method: Method | None = None
    direction: Direction | None = None
    seed: Seed | None = None
    use_side_information: bool | None = None


class FitProgress(BaseModel):
    """How far it is."""

    fraction: float = Field(description="Progress of all trainings, from 0 to 1.")
    method: str | None = Field(description="What is being trained; null while nothing is.")


class Difference(BaseModel):
    """How much better one way to search is than another, with a 95 % confidence interval."""

    difference: float
    low: float
    high: float


class FitVerdict(BaseModel):
    """What to do with the transformation, judged on pairs that it was not trained on."""

    decision: Literal["upgrade", "fuse", "stay"] = Field(
        description="`fuse`: scores of both models, added up by whoever searches with both; what upgrading alone gains is "
        "`upgrade - stay`."
    )
    reason: str
    assumption: str | None = Field(description="What the numbers assume; null where labels decide what is relevant.")
    searches: dict[str, dict[str, float]] = Field(
        description="Measures of `stay` (old on old), `naive` (new on old as it is), `upgrade`, `fuse` and `ceiling` (all new)."
    )
    differences: dict[str, dict[str, Difference]] = Field(description="Such as `upgrade - stay`, by measure.")
    weight: float = Field(description="Weight of the upgraded score in fused scoring.")
    closed: dict[str, float | None] = Field(
        description="Share of the difference between `stay` and `ceiling` that the upgrade gains."
    )
    queries: int
    gallery: int = Field(
        description="Held-out items that were searched; without labels the measures are told from these for the whole gallery."
    )


class FitCandidate(BaseModel):
    """A method that was tried, or the reason why it was not."""

    method: str
    validation: dict[str, float]
    seconds: float
    skipped: str | None


class Fit(BaseModel):
    """The present state of a fit."""

    id: str
    gallery: str
    source_model: str
    target_model: str
    name: str = Field(description="Of the transformation; it is registered once the fit is completed.")
    method: str = Field(description="As requested; `fitted_method` is the one that was chosen.")
    direction: Direction
    seed: int
    use_side_information: bool | None
    pairs: int
    state: State
    progress: FitProgress
    fitted_method: str | None
    artifact: str | None
    verdict: FitVerdict | None
    evaluation: dict[str, float | None] | None
    candidates: list[FitCandidate]
    parts: dict[str, int] | None = Field(description="Pairs used for training, for selection, and for the verdict.")
    warnings: list[str]
    error: str | None
    attempts: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class Fits(BaseModel):
    """A page of fits, the newest first."""

    fits: list[Fit]
    next_page_token: str | None


_FIT = {
    "gallery": "photos",
    "name": "r18-to-r50",
    "target": "resnet50-v2",
    "pairs": [{"id": "img-17", "embedding": [0.3, 0.4, 0.5], "label": "shoe"}],
}
_ARROW = {
    arrow.MEDIA_TYPE: {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": "An Arrow IPC stream with the columns `id` (string), `embedding` (list of floats, best of a fixed "
            "size), and optionally `label` (string or integer). Everything else is in query parameters.",
        },
        "example": "(binary) id: string, embedding: fixed_size_list<float>[128], label: string; 1000 rows",
    }
}


async def _asked(
    request: Request, process: ProcessDep, query: Annotated[FitQuery, Query()]
) -> AsyncIterator[tuple[FitOptions, NewPairs]]:
    """What is asked for, from a JSON body or from an Arrow stream and query parameters."""
    if media_type(request) != arrow.MEDIA_TYPE:
        require_type(request, "application/json", arrow.MEDIA_TYPE)
        async with Json(FitBody).made(request, process, lambda body: (body, _from_json(body, process))) as asked:
            yield asked
        return
    options, limit = _from_query(query), process.settings.max_arrow_bytes
    most = process.store.settings.max_fit_pairs
    async with uploads.spooled(request, process, limit, "max_arrow_bytes") as upload:
        yield options, await run_in_threadpool(arrow.read_pairs, upload.path, max_pairs=most, max_bytes=2 * limit)


@router.post(
    "/fit",
    status_code=202,
    **documented(
        errors.GalleryNotFound,
        errors.ModelNotFound,
        errors.ItemNotFound,
        errors.SameModel,
        errors.TransformationExists,
        errors.DimensionMismatch,
        errors.InvalidVector,
        errors.DuplicateId,
        errors.InvalidItem,
        errors.MissingSideInformation,
        errors.UnusablePairs,
        errors.LimitExceeded,
        errors.IdempotencyKeyReused,
        InvalidArrow,
        takes=FitBody,
        located=202,
        example=_FIT,
        other_content=_ARROW,
    ),
)
def start_fit(
    caller: MayAdmin,
    asked: Annotated[tuple[FitOptions, NewPairs], Depends(_asked, scope="function")],
    process: ProcessDep,
    response: Response,
    _: RequestSlot,
    idempotency_key: IdempotencyKey = None,
) -> Fit:
    """Fit a transformation on a worker, and register it. `Location` is the address of the fit, where its verdict will be.

    The items' stored vectors are one half of each pair, the vectors sent here are the other. A part is held out: on it the
    transformation is judged, and the verdict says whether an upgrade with it beats staying with the old model.
    """
    options, pairs = asked
    if len(pairs.ids) < MIN_PAIRS:
        raise errors.UnusablePairs(
            f"{len(pairs.ids)} pairs: a map needs {MIN_PAIRS} at the very least, and some hundreds to be worth anything",
            pointer="/pairs",
        )
    new = NewFit(
        gallery=options.gallery,
        name=options.name,
        target=options.target,
        pairs=pairs,
        request_sha256=_fingerprint(options, pairs),
        method=options.method,
        direction=options.direction,
        seed=options.seed,
        use_side=options.use_side_information,
        idempotency_key=idempotency_key,
    )
    started = once_more(lambda: fits.start(process.store, new, actor=caller.name))
    process.nudge()
    response.headers["Location"] = f"/transformations/fits/{started.fit_id}"
    return read_fit(process, started.fit_id)


@router.get("/fits", **documented())
def list_fits(_: MayAdmin, __: RequestSlot, page: PageDep, process: ProcessDep) -> Fits:
    """List fits, the newest first."""
    with process.store.catalog.reading() as session:
        rows, after = fetch(session, select(FitRow), FitRow.id, page, newest=True)
        return Fits(fits=[_fit(row) for row in rows], next_page_token=after)


@router.get("/fits/{fit}", **documented(errors.FitNotFound))
def get_fit(_: MayAdmin, __: RequestSlot, fit: str, process: ProcessDep) -> Fit:
    """Read a fit: its progress, and its verdict once it is completed."""
    return read_fit(process, fit)


@router.post(
    "/fits/{fit}/cancel",
    status_code=202,
    **documented(errors.FitNotFound, errors.InvalidStateTransition, already=Fit),
)
def cancel_fit(caller: MayAdmin, _: RequestSlot, fit: str, process: ProcessDep, response: Response) -> Fit:
    """Cancel a fit that has not ended; nothing is registered. 200 if it is cancelled already."""
    done = fits.cancel(process.store, fit, actor=caller.name)
    response.status_code = 202 if done.changed else 200
    return read_fit(process, done.fit_id)


def read_fit(process: Process, fit_id: str) -> Fit:
    """The document of a fit.

    Raises:
        FitNotFound: none has the id.
    """
    with process.store.catalog.reading() as session:
        return _fit(fit_rows.fit_row(session, fit_id))


def _from_json(body: FitBody, process: Process) -> NewPairs:
    target = process.seen(lambda world: world.model(body.target, pointer="/target"))
    unlabelled = [at for at, pair in enumerate(body.pairs) if pair.label is None]
    if unlabelled and len(unlabelled) < len(body.pairs):
        raise errors.InvalidItem("label all pairs, or none", pointer=f"/pairs/{unlabelled[0]}/label")
    vectors = [pair.embedding for pair in body.pairs]
    return NewPairs(
        ids=[pair.id for pair in body.pairs],
        embeddings=stack(vectors, target.dimension, target.name, "/pairs/{row}/embedding"),
        labels=None if unlabelled else [str(pair.label) for pair in body.pairs],
    )


def _from_query(query: FitQuery) -> FitOptions:
    try:
        return FitOptions.model_validate(query.model_dump(exclude_none=True))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise invalid([(each["loc"], each["type"], each["msg"]) for each in found]) from None


def _fingerprint(options: FitOptions, pairs: NewPairs) -> str:
    meant = options.model_dump(include=set(FitOptions.model_fields))
    with np.errstate(over="ignore"):  # what is too large for float32 is refused later, with its place
        vectors = np.ascontiguousarray(pairs.embeddings, dtype="<f4")
    return fingerprint("fit", [meant, list(pairs.ids), pairs.labels], vectors=vectors.data)


def _fit(row: FitRow) -> Fit:
    report: dict[str, Any] = row.report
    return Fit(
        id=row.id,
        gallery=row.gallery_name,
        source_model=row.source.name,
        target_model=row.target.name,
        name=row.name,
        method=row.method,
        direction=row.direction,
        seed=row.seed,
        use_side_information=row.use_side,
        pairs=row.pairs,
        state=row.state,  # type: ignore[arg-type]
        progress=FitProgress(fraction=row.fraction, method=row.trying),
        fitted_method=report.get("method"),
        artifact=row.artifact,
        verdict=FitVerdict.model_validate(report["verdict"]) if "verdict" in report else None,
        evaluation=report.get("evaluation"),
        candidates=[FitCandidate.model_validate(each) for each in report.get("candidates", ())],
        parts=report.get("parts"),
        warnings=report.get("warnings", []),
        error=row.error,
        attempts=row.attempts,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )
