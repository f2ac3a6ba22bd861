"""Upgrades: start, read, steer. What they look like as JSON is in `service/upgrade_documents.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Response
from sqlalchemy import select

from gallery import errors
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import UpgradeRow, UpgradeSegmentRow
from gallery.upgrade import drive, lifecycle, refinement, starting
from gallery.upgrade.moves import Changed
from gallery.upgrade.plan import Order
from service.auth import MayAdmin
from service.bodies import Body, parsed
from service.documents import documented
from service.errors import InvalidRequest, NoUncertainty
from service.idempotency import IdempotencyKey, fingerprint
from service.paging import PageDep, fetch, position, token
from service.process import Process, ProcessDep, RequestSlot, once_more
from service.refinement import least_certain
from service.upgrade_documents import (
    CutoverBody,
    Failures,
    NothingBody,
    Refinement,
    ThrottleBody,
    UndoBody,
    Upgrade,
    UpgradeBody,
    Upgrades,
    failure_document,
    refinement_document,
    upgrade_documents,
)

router = APIRouter(prefix="/admin/upgrades", tags=["upgrades"])


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
        located=202,
        example={"gallery": "photos", "transformation": "r18-to-r50", "throttle": {"duty_cycle": 0.5}},
    ),
)
def start_upgrade(
    caller: MayAdmin,
    body: Annotated[UpgradeBody, parsed(UpgradeBody)],
    process: ProcessDep,
    response: Response,
    _: RequestSlot,
    idempotency_key: IdempotencyKey = None,
) -> Upgrade:
    """Start an upgrade. Workers carry it out while searches go on. `Location` is the address of the upgrade."""
    if (body.transformation is None) == (body.target_model is None):
        raise InvalidRequest("name either `transformation` or `target_model`", pointer="/transformation")
    order = Order(body.order)
    if order is Order.MOST_SEARCHED:
        process.metrics.hits.write(process.store.catalog)  # what was searched here until now counts
    new = starting.NewUpgrade(
        gallery=body.gallery,
        transformation=body.transformation,
        target_model=body.target_model,
        cutover=body.cutover,
        order=order,
        on_missing_side_information=body.on_missing_side_information,
        on_contradicting_items=body.on_contradicting_items,
        throttle=body.throttle.model_dump(exclude_none=True),
        gate=body.gate.model_dump(exclude_none=True),
        score_thresholds=body.score_thresholds,
        dry_run=body.dry_run,
        idempotency_key=idempotency_key,
        request_sha256=fingerprint("upgrade", body.meant()),
    )
    started = once_more(lambda: starting.start(process.store, new, actor=caller.name))
    process.nudge()
    response.headers["Location"] = f"/admin/upgrades/{started.upgrade_id}"
    return _told(process, started.upgrade_id)


@router.get("", **documented())
def list_upgrades(_: MayAdmin, __: RequestSlot, page: PageDep, process: ProcessDep) -> Upgrades:
    """List upgrades, the newest first."""
    with process.store.catalog.reading() as session:
        rows, after = fetch(session, select(UpgradeRow), UpgradeRow.id, page, newest=True)
        found = Upgrades(upgrades=upgrade_documents(session, rows), next_page_token=after)
    process.galleries.announced()
    return found


@router.get("/{upgrade}", **documented(errors.UpgradeNotFound))
def get_upgrade(_: MayAdmin, __: RequestSlot, upgrade: str, process: ProcessDep) -> Upgrade:
    """Read an upgrade. Its progress is counted from rows, so it is true after any crash.

    The next search sees what the answer reports as done.
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
    upgrade: str,
    body: Annotated[ThrottleBody, parsed(ThrottleBody)],
    process: ProcessDep,
    _: RequestSlot,
) -> Upgrade:
    """Change the throttle of a running upgrade. Limits that are not named stay; null removes a limit."""
    throttle = body.throttle.model_dump(exclude_unset=True)
    lifecycle.change_throttle(process.store, upgrade, throttle, actor=caller.name)
    process.nudge()
    return _told(process, upgrade)


def _verb(
    *refuses: type[errors.GalleryError], takes: type[Body] = NothingBody, example: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What the routes of all verbs have in common: 202, or 200 if it is so already, and a body that may be left out."""
    return {
        "status_code": 202,
        **documented(
            errors.UpgradeNotFound,
            errors.InvalidStateTransition,
            *refuses,
            takes=takes,
            example=example or {},
            optional=True,
            already=Upgrade,
        ),
    }


_VERB = _verb()
_UNDO = _verb(errors.NativeItemsWouldBeUnreachable, takes=UndoBody, example={"accept_unreachable": True})
_CUTOVER = _verb(errors.GateClosed, takes=CutoverBody, example={"accept_below_gate": True})
_Nothing = Annotated[NothingBody, parsed(NothingBody, optional=True)]
_Undo = Annotated[UndoBody, parsed(UndoBody, optional=True)]


@router.post("/{upgrade}/pause", **_VERB)
def pause(
    caller: MayAdmin, upgrade: str, _: _Nothing, process: ProcessDep, response: Response, __: RequestSlot
) -> Upgrade:
    """Pause: no more segments start; those in progress finish. 200 if it is paused already."""
    return _done(process, response, lambda: lifecycle.pause(process.store, upgrade, actor=caller.name))


@router.post("/{upgrade}/resume", **_VERB)
def resume(
    caller: MayAdmin, upgrade: str, _: _Nothing, process: ProcessDep, response: Response, __: RequestSlot
) -> Upgrade:
    """Continue where it stopped; after a failure, failed segments are tried again. 200 if it runs already.

    An upgrade that its gate had stopped after its start goes on in spite of the gate; `retry` would measure it again.
    """
    return _done(process, response, lambda: lifecycle.resume(process.store, upgrade, actor=caller.name))


@router.post("/{upgrade}/retry", **_VERB)
def retry(
    caller: MayAdmin, upgrade: str, _: _Nothing, process: ProcessDep, response: Response, __: RequestSlot
) -> Upgrade:
    """Try the failed segments again, and only those. 200 if nothing failed.

    An upgrade that failed before its first segment, or at its end, is checked, verified and measured again.
    """
    return _done(process, response, lambda: lifecycle.retry(process.store, upgrade, actor=caller.name))


@router.post("/{upgrade}/cutover", **_CUTOVER)
def cutover(
    caller: MayAdmin,
    upgrade: str,
    body: Annotated[CutoverBody, parsed(CutoverBody, optional=True)],
    process: ProcessDep,
    response: Response,
    _: RequestSlot,
) -> Upgrade:
    """Let all transformed segments serve at once, where `cutover` is `manual`. 200 if they do already.

    The probes are asked on the upgraded columns first; where they miss the gate, that must be accepted.
    """
    accept = body.accept_below_gate
    return _done(
        process,
        response,
        lambda: drive.cutover(
            process.store, process.galleries, process.searcher, upgrade, accept_below_gate=accept, actor=caller.name
        ),
    )


@router.post("/{upgrade}/finalize", **_VERB)
def finalize(
    caller: MayAdmin, upgrade: str, _: _Nothing, process: ProcessDep, response: Response, __: RequestSlot
) -> Upgrade:
    """Delete the older models' columns and free their space. This cannot be undone. 200 if it is finalized already.

    Upgrades that it started on top of are finalized with it.
    """
    return _done(process, response, lambda: lifecycle.finalize(process.store, upgrade, actor=caller.name))


@router.post("/{upgrade}/cancel", **_UNDO)
def cancel(
    caller: MayAdmin, upgrade: str, body: _Undo, process: ProcessDep, response: Response, _: RequestSlot
) -> Upgrade:
    """Return to the state before the upgrade. Its columns are deleted; items are not. 200 if it is cancelled already."""
    accept = body.accept_unreachable
    return _done(
        process,
        response,
        lambda: lifecycle.cancel(process.store, upgrade, accept_unreachable=accept, actor=caller.name),
    )


@router.post("/{upgrade}/rollback", **_UNDO)
def rollback(
    caller: MayAdmin, upgrade: str, body: _Undo, process: ProcessDep, response: Response, _: RequestSlot
) -> Upgrade:
    """Undo a completed upgrade, byte for byte, until it is finalized. 200 if it is rolled back already.

    Upgrades that started on top of it must be finalized or undone first.
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
    return Failures(failures=[failure_document(row) for row in rows], next_page_token=after)


@router.get("/{upgrade}/refinement", **documented(errors.UpgradeNotFound, errors.GalleryNotFound, NoUncertainty))
def get_refinement(_: MayAdmin, __: RequestSlot, upgrade: str, page: PageDep, process: ProcessDep) -> Refinement:
    """List ids in the order in which embedding them again from raw data pays most: the least certain first.

    Send what comes of it with `POST /galleries/{gallery}/items` in the target model: it takes the place of what was derived.
    """
    with process.store.catalog.reading() as session:
        row = upgrade_rows.upgrade_row(session, upgrade)
        counted = refinement.refined(session, row)
    start = position(page)
    end = start + page.size
    listed = least_certain(process, row, slice(start, end))
    return refinement_document(row, counted, listed, token(end) if end < listed.total else None)


def _done(process: Process, response: Response, verb: Callable[[], Changed]) -> Upgrade:
    """Say that it was done, or that it was so already."""
    done = verb()
    response.status_code = 202 if done.changed else 200
    if done.changed:
        process.nudge()
    return _told(process, done.upgrade_id)


def _told(process: Process, upgrade_id: str) -> Upgrade:
    """The document of an upgrade; whatever it says is done, the next search sees.

    Raises:
        UpgradeNotFound: none has the id.
    """
    with process.store.catalog.reading() as session:
        (document,) = upgrade_documents(session, [upgrade_rows.upgrade_row(session, upgrade_id)])
    process.galleries.announced()
    return document
