"""Fits: a transformation is trained inside the service. Asked for and cancelled here; `gallery/fitting.py` does the work.

As with an upgrade, the row is the job, and the pairs wait in files that it names until it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sqlalchemy import select
from sqlalchemy.orm import Session
from ulid import ULID

from gallery import errors
from gallery.arrays import Metric
from gallery.catalog import audit, claims, idempotency
from gallery.catalog import fits as fit_rows
from gallery.catalog.fits import CANCELLED
from gallery.catalog.tables import FitRow, TransformationRow
from gallery.catalog.transaction import Transaction
from gallery.pairs import AcceptedPairs, Kept, NewPairs, Pairs, accept_pairs, keep
from gallery.spaces import Direction
from gallery.store import Store


@dataclass(frozen=True, slots=True)
class NewFit:
    """The request for a fit."""

    gallery: str
    #: of the transformation that is to be registered
    name: str
    #: the model that embedded the pairs anew
    target: str
    pairs: NewPairs
    #: digest of the request
    request_sha256: str
    method: str = "auto"
    direction: Direction = "forward"
    seed: int = 0
    #: whether to use side-information; None: if all items have it
    use_side: bool | None = None
    idempotency_key: str | None = None


class Changed(NamedTuple):
    """The fit after a verb, and whether the verb did anything."""

    fit_id: str
    changed: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """What a training is told beside the pairs."""

    method: str
    direction: Direction
    #: how vectors are compared in the space that the map leads to, and in the one that it starts from
    metric: Metric
    other_metric: Metric
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training gave, besides its file."""

    sha256: str
    bytes: int
    #: what the catalog records of the artifact
    architecture: Mapping[str, Any]
    method: str
    #: what is stored with the transformation, and with the fit; plain data
    evaluation: Mapping[str, Any]
    report: Mapping[str, Any]


#: told the fraction that is done, and the method that is being trained
Tell = Callable[[float, str], None]


class Fit(Protocol):
    """Trains a transformation."""

    def __call__(self, pairs: Pairs, asked: Asked, path: Path, tell: Tell) -> Outcome:
        """Write a durable artifact to `path`. Call `tell` often, and do not catch what it raises: it may end the training.

        Raises:
            UnusablePairs: nothing can be fitted to these pairs.
        """


def start(store: Store, new: NewFit, *, actor: str | None = None) -> Changed:
    """Keep the pairs and record the fit; a worker takes it from there.

    Raises:
        GalleryNotFound, ModelNotFound, SameModel: as they say.
        TransformationExists: the name is taken, by a transformation or by another fit.
        IdempotencyKeyReused: the key came with another request before.
        Invalid, NotFound: a pair cannot be used; see `gallery.pairs.accept_pairs`.
    """
    with store.catalog.reading() as session:
        known = idempotency.started_by(session, FitRow, new.idempotency_key, new.request_sha256)
        if known is not None:
            return Changed(known, changed=False)
        _check_name(session, new.name)
        accepted = accept_pairs(session, new.gallery, new.target, new.pairs, use_side=new.use_side)
    kept = keep(store.files, accepted)
    with store.catalog.transaction("fit_start") as tx, store.files.unnamed(kept.names):
        claims.hold(tx.session)
        known = idempotency.started_by(tx.session, FitRow, new.idempotency_key, new.request_sha256)
        if known is not None:
            tx.after.append(lambda: store.files.remove(kept.names))
            return Changed(known, changed=False)
        _check_name(tx.session, new.name)
        row = _row(new, accepted, kept)
        tx.session.add(row)
        tx.session.flush()
        audit.record(tx.session, "fit.started", gallery=new.gallery, actor=actor, fit=row.id, transformation=new.name)
    return Changed(row.id, changed=True)


def cancel(store: Store, fit_id: str, *, actor: str | None = None) -> Changed:
    """End a fit that has not ended; a worker that is at it notices at its next step.

    Raises:
        FitNotFound: none has the id.
        InvalidStateTransition: it has ended otherwise.
    """
    with store.catalog.transaction() as tx:
        row = fit_rows.fit_row(tx.session, fit_id, lock=True)
        if row.state == CANCELLED:
            return Changed(fit_id, changed=False)
        if not row.active:
            raise errors.InvalidStateTransition(f"a fit that is {row.state} cannot be cancelled", allowed=[])
        end(store, tx, row, CANCELLED, actor=actor)
    return Changed(fit_id, changed=True)


def end(
    store: Store, tx: Transaction, row: FitRow, state: str, error: str | None = None, *, actor: str | None = None
) -> None:
    """Bring a fit to its end; the files of its pairs go once no row names them."""
    names = fit_rows.end(row, state, error)
    audit.record(
        tx.session,
        f"fit.{state}",
        gallery=row.gallery_name,
        actor=actor,
        fit=row.id,
        transformation=row.name,
        artifact=row.artifact,
        error=error,
    )
    tx.after.append(lambda: store.files.remove(names))


def _check_name(session: Session, name: str) -> None:
    if session.scalar(select(TransformationRow.id).where(TransformationRow.name == name)) is not None:
        raise errors.TransformationExists(f"a transformation is named {name!r} already", pointer="/name")
    other = fit_rows.wanting(session, name)
    if other is not None:
        raise errors.TransformationExists(f"fit {other} will register a transformation {name!r}", pointer="/name")


def _row(new: NewFit, accepted: AcceptedPairs, kept: Kept) -> FitRow:
    return FitRow(
        id=str(ULID()),
        gallery_id=accepted.gallery_id,
        gallery_name=new.gallery,
        source_id=accepted.source.id,
        target_id=accepted.target.id,
        name=new.name,
        method=new.method,
        direction=new.direction,
        seed=new.seed,
        use_side=new.use_side,
        pairs=len(accepted.ids),
        ids_file=kept.ids.name,
        ids_sha256=kept.ids.sha256,
        vectors_file=kept.vectors.name,
        vectors_sha256=kept.vectors.sha256,
        labels_file=kept.labels.name if kept.labels else None,
        labels_sha256=kept.labels.sha256 if kept.labels else None,
        idempotency_key=new.idempotency_key,
        request_sha256=new.request_sha256,
    )
