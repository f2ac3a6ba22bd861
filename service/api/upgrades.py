"""Upgrades: start, read, steer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Header, Response
from pydantic import BaseModel, Field, FiniteFloat
from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery import errors
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import UpgradeRow, UpgradeSegmentRow
from gallery.upgrade import drive, lifecycle, progress, refinement
from gallery.upgrade.lifecycle import Changed, NewUpgrade
from gallery.upgrade.plan import Order
from gallery.upgrade.states import State
from service.auth import MayAdmin
from service.bodies import Body, Json, Reference
from service.documents import documented
from service.errors import InvalidRequest, NoUncertainty
from service.paging import PageDep, fetch, token
from service.process import Process, ProcessDep, RequestSlot, once_more
from service.refinement import least_certain

router = APIRouter(prefix="/admin/upgrades", tags=["upgrades"])

Cutover = Literal["progressive", "automatic", "manual"]


Share = Annotated[float, Field(ge=0, le=1)]


class Throttle(Body):
    """How fast it may go; null removes a limit."""

    items_per_second: float | None = Field(default=None, gt=0)
    duty_cycle: float | None = Field(default=None, gt=0, le=1, description="Share of the time that a worker works.")
    max_search_p99_ms: float | None = Field(default=None, gt=0, description="Held back while searches are slower.")


class Gate(Body):
    """What the gallery's probes must reach, or the upgrade does not begin, pauses, or does not cut over."""

    min_cmc1: Share | None = Field(default=None, description="Least share of probes whose first hit is relevant.")
    min_recall_at_10: Share | None = Field(default=None, description="Least share of the relevant ids among ten hits.")
    min_map: Share | None = Field(default=None, description="Least mean average precision over the ten hits.")
    min_overlap_at_10: Share | None = Field(
        default=None,
        description="Least share of a source-model query's ten hits that are hits still; needs no relevant ids.",
    )
    max_negative_flips: int | None = Field(
        default=None, ge=0, description="Most probes whose first hit was relevant before and is not now."
    )
    max_cmc1_drop: Share | None = Field(default=None, description="How much lower than before it may be.")
    max_recall_drop: Share | None = Field(default=None, description="Of `recall_at_10`.")
    max_map_drop: Share | None = None


class UpgradeBody(Body):
    """Which gallery to upgrade, and by which transformation, or to which model by the latest one."""

    gallery: Reference
    transformation: Reference | None = None
    target_model: Reference | None = None
    cutover: Cutover = "progressive"
    order: Literal["stored", "uncertainty", "most_searched"] = Field(
        default="stored",
        description="Of the segments: as stored, least certain first (needs an uncertainty head), or most searched first.",
    )
    throttle: Throttle = Throttle()
    gate: Gate = Gate()
    on_missing_side_information: Literal["fail", "zeros", "skip"] = "fail"
    score_thresholds: list[FiniteFloat] = Field(
        default=[],
        max_length=20,
        description="Cut-offs that clients use on the scores of source-model queries; the report names what becomes of them.",
    )
    dry_run: bool = Field(default=False, description="Check and report, and change nothing.")


class ThrottleBody(Body):
    """New limits."""

    throttle: Throttle


class CutoverBody(Body):
    """Consent to what was measured."""

    accept_below_gate: bool = Field(default=False, description="Let it serve although its gate is missed.")


class NothingBody(Body):
    """Nothing: this verb takes no options, and what it does not know it does not pass over."""


class UndoBody(Body):
    """Consent to what an undo would cost."""

    accept_unreachable: bool = Field(
        default=False, description="Items that came natively in the target model may be lost to source-model queries."
    )


class Progress(BaseModel):
    """Counted from rows."""

    items_total: int
    items_done: int
    segments_total: int
    segments_done: int
    segments_failed: int
    fraction: float
    items_per_second: float | None
    eta_seconds: float | None


class Measures(BaseModel):
    """What probes found; null where there is nothing to tell it from."""

    probes: int = Field(description="Probes that were asked.")
    judged: int = Field(default=0, description="Of these, with known relevant ids.")
    k: int = Field(default=10, description="Hits of each.")
    cmc1: float | None = Field(default=None, description="Share of the judged ones whose first hit is relevant.")
    recall_at_10: float | None = Field(
        default=None, description="Share of the relevant ids, at most ten each, among the hits."
    )
    map: float | None = Field(
        default=None, description="Mean average precision over the hits; what is not a hit is missed."
    )
    overlap_at_10: float | None = Field(
        default=None, description="Share of the hits of the source model's query that are hits still; over all probes."
    )
    negative_flips: int | None = Field(
        default=None,
        description="Judged ones whose first hit is relevant for the source model's query and not for this.",
    )


class Point(Measures):
    """Quality at some progress."""

    fraction: float = Field(description="Of the items, what was done.")


class Refined(Measures):
    """Quality at some refinement."""

    fraction: float = Field(description="Of the items, those whose vector the target model itself made.")
    items: int = Field(description="How many these were.")


class Quality(BaseModel):
    """What was measured with probes; null where there is nothing to measure with."""

    before: Measures | None = Field(description="Queries of the source model, when `now` was measured.")
    now: Measures | None = Field(description="Queries of the target model, of what searches see.")
    expected_after: Measures | None = Field(
        description="Queries of the target model over the whole gallery, each candidate transformed; before the cutover of "
        "an upgrade that is not progressive, over the upgraded columns themselves."
    )
    by_progress: list[Point] = Field(description="`now` while a progressive upgrade ran; at most 128 points, evenly.")
    by_refinement: list[Refined] = Field(
        description="Queries of the target model after the upgrade, while items were embedded again; at most 128 points."
    )


class Condition(BaseModel):
    """Why it does not go at full speed."""

    type: str
    since: datetime
    reason: str
    detail: str


class Pinned(BaseModel):
    """A transformation that an upgrade was started with."""

    transformation: str
    source_model: str
    artifact_sha256: str


class Upgrade(BaseModel):
    """An upgrade as it stands."""

    id: str
    gallery: str
    source_model: str
    target_model: str
    transformation: str
    artifact_sha256: str
    pinned: list[Pinned] = Field(
        description="Every transformation that it may use, that one first: per segment, the one that leaves the fewest "
        "transformations between its vectors and those that a model made."
    )
    state: State
    cutover: Cutover
    order: Order
    on_missing_side_information: str
    dry_run: bool
    throttle: dict[str, float]
    gate: dict[str, float]
    progress: Progress
    quality: Quality
    report: dict[str, Any] = Field(
        description="What validation found: `checks`, each passed or not and why; items, and what lacks side-information; "
        "bytes of disk and memory needed and free, seconds estimated; `known_answers`; `score_thresholds`; and where the "
        "order is not `stored`, the segments that go first and why."
    )
    conditions: list[Condition]
    allowed: list[str] = Field(description="Verbs that it takes now.")
    finalize_frees: int | None = Field(description="Bytes that a finalize would free now; null where it takes none.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None


class Upgrades(BaseModel):
    """A page of upgrades, the newest first."""

    upgrades: list[Upgrade]
    next_page_token: str | None


class Failure(BaseModel):
    """A segment that was set aside."""

    segment: int
    items: int
    attempts: int
    error: str | None


class Failures(BaseModel):
    """A page of failed segments."""

    failures: list[Failure]
    next_page_token: str | None


class Refinement(BaseModel):
    """Ids in the order in which embedding them from raw data pays most, and what it paid so far."""

    ids: list[str]
    next_page_token: str | None
    native_items: int = Field(description="Items whose vector the target model itself made.")
    derived_items: int = Field(description="Items that could still be embedded again: all ids of this list.")
    fraction: float = Field(description="Of both, the native ones.")
    quality: list[Refined] = Field(
        description="Measured with probes as `fraction` grew; of the upgrade's `quality` too."
    )
    predicted_variance_left: list[float] = Field(
        description="After each tenth of this list, from none of it to all: the share of the variance that the "
        "transformation predicts which is left. Where it hardly falls any more, embedding again hardly pays."
    )


@router.post(
    "",
    status_code=202,
    **documented(
        errors.GalleryNotFound,
        errors.ModelNotFound,
        errors.TransformationNotFound,
        errors.UpgradeInProgress,
        errors.WrongTransformation,
        errors.SameModel,
        errors.IdempotencyKeyReused,
        takes=UpgradeBody,
        example={"gallery": "photos", "transformation": "r18-to-r50", "throttle": {"duty_cycle": 0.5}},
    ),
)
def start_upgrade(
    caller: MayAdmin,
    _: RequestSlot,
    body: Annotated[UpgradeBody, Depends(Json(UpgradeBody))],
    process: ProcessDep,
    response: Response,
    idempotency_key: Annotated[
        str | None,
        Header(min_length=1, max_length=255, description="The same request with the same key starts nothing new."),
    ] = None,
) -> Upgrade:
    """Start an upgrade; workers take it from there, and searches go on. `Location` says where to watch it."""
    if (body.transformation is None) == (body.target_model is None):
        raise InvalidRequest("name either `transformation` or `target_model`", pointer="/transformation")
    order = Order(body.order)
    if order is Order.MOST_SEARCHED:
        process.metrics.hits.write(process.store.catalog)  # what was searched here until now counts
    new = NewUpgrade(
        gallery=body.gallery,
        transformation=body.transformation,
        target_model=body.target_model,
        cutover=body.cutover,
        order=order,
        on_missing_side_information=body.on_missing_side_information,
        throttle=body.throttle.model_dump(exclude_none=True),
        gate=body.gate.model_dump(exclude_none=True),
        score_thresholds=body.score_thresholds,
        dry_run=body.dry_run,
        idempotency_key=idempotency_key,
        request_sha256=_fingerprint(body),
    )
    started = once_more(lambda: lifecycle.start(process.store, new, actor=caller.name))
    process.nudge()
    response.headers["Location"] = f"/admin/upgrades/{started.upgrade_id}"
    return _told(process, started.upgrade_id)


@router.get("", **documented())
def list_upgrades(_: MayAdmin, __: RequestSlot, page: PageDep, process: ProcessDep) -> Upgrades:
    """List upgrades, the newest first."""
    with process.store.catalog.reading() as session:
        rows, after = fetch(session, select(UpgradeRow), UpgradeRow.id, page, newest=True)
        found = Upgrades(upgrades=[_upgrade(session, row) for row in rows], next_page_token=after)
    process.galleries.announced()
    return found


@router.get("/{upgrade}", **documented(errors.UpgradeNotFound))
def get_upgrade(_: MayAdmin, __: RequestSlot, upgrade: str, process: ProcessDep) -> Upgrade:
    """Read an upgrade. Its progress is counted from rows, so it is true after any crash.

    What the answer says is done serves the next search.
    """
    return _told(process, upgrade)


@router.patch(
    "/{upgrade}",
    **documented(
        errors.UpgradeNotFound,
        errors.InvalidStateTransition,
        takes=ThrottleBody,
        example={"throttle": {"items_per_second": 5000, "max_search_p99_ms": 50}},
    ),
)
def change_throttle(
    caller: MayAdmin,
    _: RequestSlot,
    upgrade: str,
    body: Annotated[ThrottleBody, Depends(Json(ThrottleBody))],
    process: ProcessDep,
) -> Upgrade:
    """Change the throttle while it runs. What is not named stays; null removes a limit."""
    with process.store.catalog.reading() as session:
        row = upgrade_rows.upgrade_row(session, upgrade)
        can = lifecycle.takes(session, row)
    if not row.active:
        raise errors.InvalidStateTransition(f"an upgrade that is {row.state} has nothing to throttle", allowed=can)
    throttle = body.throttle.model_dump(exclude_unset=True)
    lifecycle.change_throttle(process.store, upgrade, throttle, actor=caller.name)
    process.nudge()
    return _told(process, upgrade)


_CUTOVER = {
    "status_code": 202,
    **documented(
        errors.UpgradeNotFound,
        errors.InvalidStateTransition,
        errors.GateClosed,
        takes=CutoverBody,
        example={"accept_below_gate": True},
        optional=True,
        already=Upgrade,
    ),
}
_VERB = {
    "status_code": 202,
    **documented(
        errors.UpgradeNotFound,
        errors.InvalidStateTransition,
        takes=NothingBody,
        example={},
        optional=True,
        already=Upgrade,
    ),
}
_Nothing = Annotated[NothingBody, Depends(Json(NothingBody, optional=True))]
_UNDO = {
    "status_code": 202,
    **documented(
        errors.UpgradeNotFound,
        errors.InvalidStateTransition,
        errors.NativeItemsWouldBeUnreachable,
        takes=UndoBody,
        example={"accept_unreachable": True},
        optional=True,
        already=Upgrade,
    ),
}
_Undo = Annotated[UndoBody, Depends(Json(UndoBody, optional=True))]


@router.post("/{upgrade}/pause", **_VERB)
def pause(
    caller: MayAdmin, _: RequestSlot, upgrade: str, __: _Nothing, process: ProcessDep, response: Response
) -> Upgrade:
    """Lease no more segments; the one under way finishes. 200 if it is paused already."""
    return _done(process, response, lambda: lifecycle.pause(process.store, upgrade, actor=caller.name))


@router.post("/{upgrade}/resume", **_VERB)
def resume(
    caller: MayAdmin, _: RequestSlot, upgrade: str, __: _Nothing, process: ProcessDep, response: Response
) -> Upgrade:
    """Go on where it stopped; after a failure, with another try for what failed. 200 if it runs already.

    Where its gate had stopped an upgrade that had begun, it goes on in spite of that; `retry` would measure it again.
    """
    return _done(process, response, lambda: lifecycle.resume(process.store, upgrade, actor=caller.name))


@router.post("/{upgrade}/retry", **_VERB)
def retry(
    caller: MayAdmin, _: RequestSlot, upgrade: str, __: _Nothing, process: ProcessDep, response: Response
) -> Upgrade:
    """Try the failed segments again, and only those. 200 if none failed."""
    return _done(process, response, lambda: lifecycle.retry(process.store, upgrade, actor=caller.name))


@router.post("/{upgrade}/cutover", **_CUTOVER)
def cutover(
    caller: MayAdmin,
    _: RequestSlot,
    upgrade: str,
    body: Annotated[CutoverBody, Depends(Json(CutoverBody, optional=True))],
    process: ProcessDep,
    response: Response,
) -> Upgrade:
    """Let all transformed segments serve at once, where `cutover` is `manual`. 200 if they do already.

    The probes are asked on the upgraded columns first; where they miss the gate, that must be accepted.
    """
    accept = body.accept_below_gate
    return _done(
        process,
        response,
        lambda: drive.cutover(
            process.store,
            process.galleries,
            process.searcher,
            upgrade,
            accept_below_gate=accept,
            actor=caller.name,
        ),
    )


@router.post("/{upgrade}/finalize", **_VERB)
def finalize(
    caller: MayAdmin, _: RequestSlot, upgrade: str, __: _Nothing, process: ProcessDep, response: Response
) -> Upgrade:
    """Let go of the older models' columns: no way back, and their bytes are free. 200 if it was done before.

    What it started on top of is finalized with it.
    """
    return _done(process, response, lambda: lifecycle.finalize(process.store, upgrade, actor=caller.name))


@router.post("/{upgrade}/cancel", **_UNDO)
def cancel(
    caller: MayAdmin, _: RequestSlot, upgrade: str, body: _Undo, process: ProcessDep, response: Response
) -> Upgrade:
    """Go back to the state before; the columns that it made are dropped, and no item is. 200 if it is cancelled already."""
    accept = body.accept_unreachable
    return _done(
        process,
        response,
        lambda: lifecycle.cancel(process.store, upgrade, accept_unreachable=accept, actor=caller.name),
    )


@router.post("/{upgrade}/rollback", **_UNDO)
def rollback(
    caller: MayAdmin, _: RequestSlot, upgrade: str, body: _Undo, process: ProcessDep, response: Response
) -> Upgrade:
    """Undo a completed upgrade, byte for byte, until it is finalized. 200 if it is rolled back already.

    What started on top of it must be finalized or undone before.
    """
    accept = body.accept_unreachable
    return _done(
        process,
        response,
        lambda: lifecycle.rollback(process.store, upgrade, accept_unreachable=accept, actor=caller.name),
    )


@router.get("/{upgrade}/failures", **documented(errors.UpgradeNotFound))
def list_failures(_: MayAdmin, __: RequestSlot, upgrade: str, page: PageDep, process: ProcessDep) -> Failures:
    """List the segments that were set aside, with the last error of each."""
    with process.store.catalog.reading() as session:
        upgrade_rows.upgrade_row(session, upgrade)
        statement = select(UpgradeSegmentRow).where(
            UpgradeSegmentRow.upgrade_id == upgrade, UpgradeSegmentRow.state == "failed"
        )
        rows, after = fetch(session, statement, UpgradeSegmentRow.segment_id, page)
    failures = [Failure(segment=r.segment_id, items=r.rows, attempts=r.attempts, error=r.error) for r in rows]
    return Failures(failures=failures, next_page_token=after)


@router.get("/{upgrade}/refinement", **documented(errors.UpgradeNotFound, errors.GalleryNotFound, NoUncertainty))
def get_refinement(_: MayAdmin, __: RequestSlot, upgrade: str, page: PageDep, process: ProcessDep) -> Refinement:
    """List ids in the order in which embedding them again from raw data pays most: the least certain first.

    Send what comes of it with `POST /galleries/{gallery}/items` in the target model: it takes the place of what was derived.
    """
    with process.store.catalog.reading() as session:
        row = upgrade_rows.upgrade_row(session, upgrade)
        counted = refinement.refined(session, row)
    start = page.after if isinstance(page.after, int) else 0
    end = start + page.size
    listed = least_certain(process, row, slice(start, end))
    return Refinement(
        ids=listed.ids,
        next_page_token=token(end) if end < listed.total else None,
        native_items=counted.native,
        derived_items=counted.derived,
        fraction=counted.fraction,
        quality=[Refined(**point) for point in progress.quality(row)["by_refinement"]],
        predicted_variance_left=listed.left,
    )


def read_upgrade(process: Process, upgrade_id: str) -> Upgrade:
    """The document of an upgrade.

    Raises:
        UpgradeNotFound: none has the id.
    """
    with process.store.catalog.reading() as session:
        return _upgrade(session, upgrade_rows.upgrade_row(session, upgrade_id))


def _done(process: Process, response: Response, verb: Callable[[], Changed]) -> Upgrade:
    """Say that it was done, or that it was so already."""
    done = verb()
    response.status_code = 202 if done.changed else 200
    if done.changed:
        process.nudge()
    return _told(process, done.upgrade_id)


def _told(process: Process, upgrade_id: str) -> Upgrade:
    """The document of an upgrade; whatever it says is done, the next search sees."""
    document = read_upgrade(process, upgrade_id)
    process.galleries.announced()
    return document


def _fingerprint(body: UpgradeBody) -> str:
    """What an idempotency key stands for: the request's meaning, not its spelling."""
    return hashlib.sha256(b"upgrade\n" + orjson.dumps(body.model_dump(), option=orjson.OPT_SORT_KEYS)).hexdigest()


def _upgrade(session: Session, row: UpgradeRow) -> Upgrade:
    return Upgrade(
        id=row.id,
        gallery=row.gallery_name,
        source_model=row.source.name,
        target_model=row.target.name,
        transformation=row.transformation.name,
        artifact_sha256=row.artifact,
        pinned=[
            Pinned(transformation=each.name, source_model=each.source, artifact_sha256=each.artifact)
            for each in upgrade_rows.transformations(session, row)
        ],
        state=State(row.state),
        cutover=row.cutover,  # type: ignore[arg-type]
        order=Order(row.order),
        on_missing_side_information=row.missing_side,
        dry_run=row.dry_run,
        throttle=row.throttle,
        gate=row.gate,
        progress=Progress.model_validate(progress.progress(session, row), from_attributes=True),
        quality=Quality(**progress.quality(row)),
        report=row.report,
        conditions=[Condition.model_validate(each, from_attributes=True) for each in progress.conditions(session, row)],
        allowed=lifecycle.takes(session, row),
        finalize_frees=lifecycle.would_free(session, row),
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        error=row.error,
    )
