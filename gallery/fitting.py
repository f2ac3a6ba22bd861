"""What a worker does for a fit: lease it, read the pairs, train, and register what came of it together with the fit's end.

A worker that dies loses its lease, and another begins again from the same pairs and seed. The transaction that registers checks
the fence, so a fit registers once. How it is trained is not known here: a function from arrays to a file is handed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Event

import structlog
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from gallery import errors
from gallery.arrays import Metric
from gallery.catalog import claims
from gallery.catalog import fits as fit_rows
from gallery.catalog import models as model_rows
from gallery.catalog.fits import COMPLETED, FAILED, Lease
from gallery.catalog.models import NewTransformation
from gallery.catalog.tables import FitRow, now, rfc3339
from gallery.catalog.transaction import in_words
from gallery.files import PART, adopt
from gallery.fits import Asked, Fit, Outcome, Tell, end
from gallery.heartbeat import Stopped, heartbeat
from gallery.pairs import read
from gallery.spaces import EmbeddingModel
from gallery.store import Store
from gallery.transforms import ARTIFACTS, artifact_file

_TELL_SECONDS = 1.0  # a training step may take a millisecond, and to tell the catalog takes several
log = structlog.get_logger()


def due(store: Store) -> list[str]:
    """Fits that a worker could begin with now, the oldest first."""
    with store.catalog.reading() as session:
        return fit_rows.due(session, store.settings.lease_seconds)


def advance(store: Store, fit_id: str, owner: str, fit: Fit, go_on: Callable[[], bool]) -> bool:
    """Take a fit from its start to its end; False if another worker has it, or it was given back.

    Args:
        store: where everything is.
        fit_id: which.
        owner: who holds it meanwhile.
        fit: trains.
        go_on: asked about once a second; it may do more urgent work first. False gives the fit back.
    """
    held = _lease(store, fit_id, owner)
    if held is None:
        return False
    try:
        with _renewed(store, held):
            _work(store, held, fit, _teller(store, held, go_on))
    except errors.LeaseLost:
        pass  # cancelled, or whoever holds it now will end it
    except Stopped:
        _release(store, held)
        return False
    except errors.GalleryError as error:
        _fail(store, held, f"{error.code}: {error}", final=True)
    except Exception as error:  # noqa: BLE001 - the next attempt may be luckier; the last one is recorded
        log.warning("fit_failed", fit=fit_id, error=in_words(error))
        _fail(store, held, in_words(error), final=False)
    except BaseException:
        _release(store, held)
        raise
    return True


def searched_by(model: EmbeddingModel) -> Metric:
    """How vectors are compared in a model's space.

    Unit vectors have one order by all metrics, and what a transformation gives is brought to unit length where the model's
    own vectors have it.
    """
    return "cosine" if model.normalized else model.metric


def _lease(store: Store, fit_id: str, owner: str) -> Lease | None:
    """Lease a fit. One whose workers died again and again fails for good, so that it cannot take down every worker."""
    with store.catalog.transaction("fit_lease") as tx:
        row = fit_rows.lease(tx.session, fit_id, owner=owner, seconds=store.settings.lease_seconds)
        if row is None:
            return None
        if row.attempts > store.settings.max_attempts:
            end(store, tx, row, FAILED, row.error or f"its worker died {row.attempts - 1} times")
            return None
        return Lease(fit_id, owner, row.fence)


def _work(store: Store, held: Lease, fit: Fit, tell: Tell) -> None:
    with store.catalog.reading() as session:
        row = fit_rows.fit_row(session, held.fit_id)
        source, target = model_rows.as_model(row.source), model_rows.as_model(row.target)
    pairs = read(store, row)
    start, end = (source, target) if row.direction == "forward" else (target, source)
    asked = Asked(row.method, row.direction, searched_by(end), searched_by(start), row.seed)
    # Its name ends as an unfinished file's does, so that after a crash it is removed as an orphan.
    path = store.files.path(store.files.new(ARTIFACTS, PART))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        outcome = fit(pairs, asked, path, tell)
        adopt(store.files, path, artifact_file(outcome.sha256), outcome.sha256)
    finally:
        path.unlink(missing_ok=True)
    try:
        _complete(store, held, outcome, pairs.warnings)
    except IntegrityError:  # another process made the same row at this moment: now it is seen, and judged
        _complete(store, held, outcome, pairs.warnings)


def _complete(store: Store, held: Lease, outcome: Outcome, warnings: tuple[str, ...]) -> None:
    """Register what was made, and end the fit: both or none."""
    with store.catalog.transaction("fit_complete") as tx:
        row = fit_rows.held(tx.session, held)
        claims.hold(tx.session)
        store.files.claim([artifact_file(outcome.sha256)])
        row.report = {**outcome.report, "warnings": [*warnings, *outcome.report["warnings"]]}
        row.artifact, row.fraction = outcome.sha256, 1.0
        model_rows.add_artifact(tx.session, outcome.sha256, size=outcome.bytes, architecture=outcome.architecture)
        try:
            _register(tx.session, row, outcome)
        except errors.TransformationExists:
            # Nothing of the work is lost: the artifact is there under its digest.
            error = (
                f"a transformation was registered as {row.name!r} meanwhile: register {row.artifact} under another name"
            )
            end(store, tx, row, FAILED, error)
        else:
            end(store, tx, row, COMPLETED)


def _register(session: Session, row: FitRow, outcome: Outcome) -> None:
    old, new = row.source.name, row.target.name
    source, target = (old, new) if row.direction == "forward" else (new, old)
    definition = NewTransformation(row.name, source, target, row.direction, outcome.method, outcome.sha256)
    model_rows.add_transformation(session, definition)
    added = model_rows.transformation_row(session, row.name)
    added.evaluation = {**outcome.evaluation, "fit": row.id, "at": rfc3339(now())}


def _fail(store: Store, held: Lease, error: str, *, final: bool) -> None:
    """Record that an attempt failed. There will be another, unless the failure is final or this was the last attempt."""
    with store.catalog.transaction() as tx:
        try:
            row = fit_rows.held(tx.session, held)
        except errors.LeaseLost:
            return  # whoever holds it now will record its own
        if final or row.attempts >= store.settings.max_attempts:
            end(store, tx, row, FAILED, error[:2000])
        else:
            fit_rows.release(row)
            row.error = error[:2000]


def _release(store: Store, held: Lease) -> None:
    """End the lease without counting an attempt: the fit was given up for another reason than itself."""
    with store.catalog.transaction() as tx:
        try:
            row = fit_rows.held(tx.session, held)
        except errors.LeaseLost:
            return
        fit_rows.release(row)
        row.attempts -= 1


def _teller(store: Store, held: Lease, go_on: Callable[[], bool]) -> Tell:
    """What a training calls between two steps: it asks whether to go on, and records the progress, once a second."""
    again = 0.0

    def tell(fraction: float, method: str) -> None:
        nonlocal again
        if time.monotonic() < again:
            return
        try:
            if not go_on():
                raise Stopped
            with store.catalog.transaction() as tx:
                if not fit_rows.renew(tx.session, held, store.settings.lease_seconds, (fraction, method)):
                    raise errors.LeaseLost(f"fit {held.fit_id} is no longer held by {held.owner}")
        except SQLAlchemyError as error:  # the training is not lost with a connection; its end checks the fence
            log.warning("heartbeat_missed", of=f"fit {held.fit_id}", error=in_words(error))
        again = time.monotonic() + _TELL_SECONDS

    return tell


def _renewed(store: Store, held: Lease) -> AbstractContextManager[Event]:
    """Renew the lease while the block runs: some steps, such as a large closed form, take long and tell nothing meanwhile."""
    seconds = store.settings.lease_seconds
    return heartbeat(store, f"fit {held.fit_id}", lambda session: fit_rows.renew(session, held, seconds))
