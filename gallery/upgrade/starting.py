"""An upgrade starts: what is asked for is checked, pinned and recorded in one transaction, with its work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy.orm import Session
from ulid import ULID

from gallery import errors
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import idempotency
from gallery.catalog import items as item_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ArtifactRow, GalleryRow, TransformationRow, UpgradeRow, now
from gallery.store import Store
from gallery.transforms import no_uncertainty
from gallery.upgrade import sources
from gallery.upgrade.moves import Changed, complete, event
from gallery.upgrade.plan import Order
from gallery.upgrade.sources import Pinned
from gallery.upgrade.states import State
from gallery.upgrade.thresholds import unknown

Cutover = Literal["progressive", "automatic", "manual"]
MissingSide = Literal["fail", "zeros", "skip"]
Contradicting = Literal["fail", "ignore"]
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class NewUpgrade:
    """What is asked for when an upgrade starts."""

    gallery: str
    #: one of these two is given
    transformation: str | None = None
    target_model: str | None = None
    cutover: Cutover = "progressive"
    order: Order = Order.STORED
    on_missing_side_information: MissingSide = "fail"
    #: whether items that the target model embedded again may refuse it, or are known to be something else now
    on_contradicting_items: Contradicting = "fail"
    throttle: Mapping[str, float] = field(default_factory=dict)
    gate: Mapping[str, float] = field(default_factory=dict)
    #: cut-offs on the scores of source-model queries, for which the report names those of the target model
    score_thresholds: Sequence[float] = ()
    dry_run: bool = False
    idempotency_key: str | None = None
    #: digest of the request that the key stands for
    request_sha256: str | None = None


def start(store: Store, new: NewUpgrade, *, actor: str | None = None) -> Changed:
    """Record an upgrade and its work; a worker takes it from there.

    Raises:
        GalleryNotFound, ModelNotFound, TransformationNotFound: as they say.
        SameModel, WrongTransformation: it would not bring this gallery to another model, or not in the order asked for.
        UpgradeInProgress: the gallery has an upgrade that is not finished.
        IdempotencyKeyReused: the key came with another request before.
    """
    with store.catalog.transaction("start") as tx:
        session = tx.session
        if (known := _known(session, new)) is not None:  # whatever became of its gallery since
            return Changed(known, changed=False)
        gallery = gallery_rows.gallery_row(session, new.gallery, pointer="/gallery")
        # A dry run changes nothing that a search sees, so the version stays; the lock is needed all the same.
        (gallery_rows.lock if new.dry_run else gallery_rows.bump)(session, gallery.id)
        session.refresh(gallery)
        if (known := _known(session, new)) is not None:  # the first request with this key was under way
            return Changed(known, changed=False)
        _alone(session, gallery)  # first: once that one is over, the rest may be right
        pinned = sources.pin(session, gallery, new.transformation, new.target_model)
        for transformation in (pinned.main, *pinned.others):
            _orderable(session, transformation, new.order)
        row = _upgrade(session, gallery, pinned, new)
        event(session, row, actor, "started", transformation=pinned.main.name, others=row.others)
        if gallery_rows.items_live(session, gallery.id) == 0 and not new.dry_run:
            row.started_at = now()
            complete(session, row, gallery)
        else:
            _plan(session, row)  # a dry run has its report from a worker, whatever there is to do
    return Changed(row.id, changed=True)


def _known(session: Session, new: NewUpgrade) -> str | None:
    """The upgrade that this very request started before."""
    return idempotency.started_by(session, UpgradeRow, new.idempotency_key, new.request_sha256)


def _orderable(session: Session, transformation: TransformationRow, order: Order) -> None:
    """Refuse an order that the transformation cannot give; where the catalog does not know, a worker will find out."""
    architecture = session.get_one(ArtifactRow, transformation.artifact).architecture
    if order is Order.UNCERTAINTY and architecture.get("uncertainty") is False:
        raise no_uncertainty(transformation.name)


def _alone(session: Session, gallery: GalleryRow) -> None:
    """The database enforces it too (`upgrades_active`); this gives the better message."""
    active = upgrade_rows.active_of(session, gallery.id)
    if active is not None:
        raise errors.UpgradeInProgress(f"upgrade {active.id} of {gallery.name} is {active.state}", upgrade=active.id)


def _upgrade(session: Session, gallery: GalleryRow, pinned: Pinned, new: NewUpgrade) -> UpgradeRow:
    row = UpgradeRow(
        id=str(ULID()),
        gallery_id=gallery.id,
        gallery_name=gallery.name,
        source_id=pinned.main.source_id,
        target_id=pinned.main.target_id,
        transformation_id=pinned.main.id,
        artifact=pinned.main.artifact,
        others=[{"transformation": other.name, "artifact": other.artifact} for other in pinned.others],
        state=State.PENDING,
        active=True,
        cutover=new.cutover,
        order=new.order,
        missing_side=new.on_missing_side_information,
        contradicting=new.on_contradicting_items,
        dry_run=new.dry_run,
        throttle={name: value for name, value in new.throttle.items() if value is not None},
        gate=dict(new.gate),
        quality={},
        report=_asked(new.score_thresholds),
        idempotency_key=new.idempotency_key,
        request_sha256=new.request_sha256,
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def _plan(session: Session, row: UpgradeRow) -> None:
    """One row of work per segment that lacks the target, as they are stored; another order is measured by a worker.

    Raises:
        WrongTransformation: some segment has no column of the target, nor one that a transformation of the upgrade starts at.
    """
    lacking = segment_rows.without_model(session, row.gallery_id or 0, row.target_id)
    sourceless = sources.without_column(session, row, lacking)
    if sourceless:
        unadvised = ", ".join(sources.unadvised(session, row.target_id, sourceless))
        use = (
            f"; {unadvised} could, but its fit said that it gains nothing by itself: register its artifact by another name to "
            "use it"
        )
        segments = [segment.id for segment in sourceless]
        such_as = ", ".join(map(repr, item_rows.live_ids(session, segments, limit=_SHOWN)))
        raise errors.WrongTransformation(
            f"{item_rows.live_in(session, segments)} items, such as {such_as}, have neither {row.source.name} nor "
            f"{row.target.name} vectors, so this transformation cannot bring the whole gallery to the target: store them "
            f"again in one of these two models, or delete them{use if unadvised else ''}"
        )
    upgrade_rows.add_segments(session, row.id, [(segment.id, segment.rows) for segment in lacking], start=0)


def _asked(thresholds: Sequence[float]) -> dict[str, Any]:
    """What a report holds before anything is measured."""
    waiting = "it is measured before the first segment"
    return {"score_thresholds": [unknown(each, waiting) for each in thresholds]} if thresholds else {}
