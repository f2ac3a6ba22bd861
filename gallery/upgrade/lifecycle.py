"""The verbs of an upgrade, each one transaction.

Cancel, cutover, rollback and finalize touch rows only, a few per segment, so they are done when they are answered:
`cancelling` and `rolling_back` are passed through within the transaction, and files are removed after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from sqlalchemy import select, update
from sqlalchemy.orm import Session
from ulid import ULID

from gallery import errors
from gallery.catalog import audit, idempotency
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import items as item_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import (
    ArtifactRow,
    ColumnRow,
    GalleryRow,
    TransformationRow,
    UpgradeRow,
    now,
)
from gallery.catalog.transaction import Transaction
from gallery.store import Store
from gallery.transforms import no_uncertainty
from gallery.upgrade import sources, throttle
from gallery.upgrade.gate import waived
from gallery.upgrade.plan import Order
from gallery.upgrade.progress import progress
from gallery.upgrade.sources import Pinned
from gallery.upgrade.states import ACTIVE, State, Verb, allowed, step, wants
from gallery.upgrade.thresholds import unknown

Cutover = Literal["progressive", "automatic", "manual"]
MissingSide = Literal["fail", "zeros", "skip"]
Contradicting = Literal["fail", "ignore"]


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


class Changed(NamedTuple):
    """The upgrade after a verb, and whether the verb did anything."""

    upgrade_id: str
    changed: bool


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
        pinned = sources.pin(session, gallery, new.transformation, new.target_model)
        for transformation in (pinned.main, *pinned.others):
            _orderable(session, transformation, new.order)
        _alone(session, gallery)
        row = _upgrade(session, gallery, pinned, new)
        _event(session, row, actor, "started", transformation=pinned.main.name, others=row.others)
        if gallery_rows.items_live(session, gallery.id) == 0 and not new.dry_run:
            row.started_at = now()
            complete(session, row, gallery)
        else:
            _plan(session, row)  # a dry run has its report from a worker, whatever there is to do
    return Changed(row.id, changed=True)


def pause(store: Store, upgrade_id: str, *, actor: str | None = None) -> Changed:
    """Lease no more segments; the one under way finishes."""
    with store.catalog.transaction() as tx:
        row = upgrade_rows.upgrade_row(tx.session, upgrade_id, lock=True)
        if not _wants(tx.session, row, Verb.PAUSE):
            return Changed(row.id, changed=False)
        move(tx.session, row, State.PAUSED, actor=actor)
    return Changed(row.id, changed=True)


def resume(store: Store, upgrade_id: str, *, actor: str | None = None) -> Changed:
    """Go on where it stopped; after a failure, with another try for what failed.

    Where its gate had stopped an upgrade that had begun, it goes on in spite of it.
    """
    with store.catalog.transaction() as tx:
        row = upgrade_rows.upgrade_row(tx.session, upgrade_id, lock=True)
        if not _wants(tx.session, row, Verb.RESUME):
            return Changed(row.id, changed=False)
        if row.state == State.FAILED:
            _forgive(tx.session, row)
        if _begun(row) is State.RUNNING:
            row.quality = waived(row.quality, now().isoformat())
        move(tx.session, row, _begun(row), actor=actor)
    return Changed(row.id, changed=True)


def retry(store: Store, upgrade_id: str, *, actor: str | None = None) -> Changed:
    """Try the failed segments again, and only those; an upgrade that failed for another reason is tried again too."""
    with store.catalog.transaction() as tx:
        row = upgrade_rows.upgrade_row(tx.session, upgrade_id, lock=True)
        if not _wants(tx.session, row, Verb.RETRY):
            return Changed(row.id, changed=False)
        forgiven = _forgive(tx.session, row)
        if row.state == State.FAILED:
            move(tx.session, row, _begun(row), actor=actor)
        elif forgiven == 0:
            return Changed(row.id, changed=False)
        else:
            _event(tx.session, row, actor, "retried", segments=forgiven)
    return Changed(row.id, changed=True)


def change_throttle(
    store: Store, upgrade_id: str, limits: Mapping[str, float | None], *, actor: str | None = None
) -> None:
    """Set limits; null removes one. A higher limit is felt at once.

    Raises:
        InvalidStateTransition: the upgrade is over.
    """
    with store.catalog.transaction() as tx:
        row = upgrade_rows.upgrade_row(tx.session, upgrade_id, lock=True)
        if not row.active:
            raise errors.InvalidStateTransition(
                f"an upgrade that is {row.state} has nothing to throttle", allowed=takes(tx.session, row)
            )
        before, following = row.throttle, upgrade_rows.next_free(tx.session, row.id, store.settings.lease_seconds)
        row.throttle = {name: value for name, value in {**row.throttle, **limits}.items() if value is not None}
        rows, moment = None if following is None else following.rows, now()
        waits = throttle.believed(row.not_before, row.not_before_set_at, moment)
        row.not_before = throttle.after_change(before, row.throttle, rows, waits, moment)
        row.not_before_set_at = moment
        _event(tx.session, row, actor, "throttled", throttle=row.throttle)


def cancel(store: Store, upgrade_id: str, *, accept_unreachable: bool = False, actor: str | None = None) -> Changed:
    """Go back to the state before: the columns that it made are dropped.

    Raises:
        NativeItemsWouldBeUnreachable: items came natively in the target model, and it was not accepted that queries of the
            source model will not reach them.
    """
    return _undo(store, upgrade_id, Verb.CANCEL, (State.CANCELLING, State.CANCELLED), accept_unreachable, actor)


def rollback(store: Store, upgrade_id: str, *, accept_unreachable: bool = False, actor: str | None = None) -> Changed:
    """Undo a completed upgrade, byte for byte: the columns of the source model were never touched.

    Raises:
        InvalidStateTransition: another upgrade started on top of it, and is open.
        NativeItemsWouldBeUnreachable: as for `cancel`.
    """
    return _undo(store, upgrade_id, Verb.ROLLBACK, (State.ROLLING_BACK, State.ROLLED_BACK), accept_unreachable, actor)


def cutover(
    store: Store, upgrade_id: str, *, actor: str | None = None, admit: Callable[[UpgradeRow], None] = lambda _: None
) -> Changed:
    """Let all transformed segments serve at once, if `admit`, which is given the locked row, does not raise."""
    with store.catalog.transaction("cutover") as tx:
        row, gallery = locked(tx.session, upgrade_id)
        if not _wants(tx.session, row, Verb.CUTOVER):
            return Changed(row.id, changed=False)
        admit(row)
        complete(tx.session, row, gallery, actor=actor)
    return Changed(row.id, changed=True)


def finalize(store: Store, upgrade_id: str, *, actor: str | None = None) -> Changed:
    """Let go of the older models' columns: no way back, and their bytes are free.

    What it started on top of is finalized with it. A segment that was skipped keeps its newest column, or its items would be
    lost.
    """
    with store.catalog.transaction("finalize") as tx:
        row, gallery = locked(tx.session, upgrade_id)
        if not _wants(tx.session, row, Verb.FINALIZE) or gallery is None:  # without one, nothing is wanted
            return Changed(row.id, changed=False)
        for each, models, newer in _with_below(tx.session, row, gallery.id):
            freed = drop(store, tx, segment_rows.older(tx.session, gallery.id, models, newer))
            each.report = {**each.report, "bytes_freed": freed, **({} if each is row else {"finalized_with": row.id})}
            move(tx.session, each, State.FINALIZED, actor=actor, bytes_freed=freed)
    return Changed(row.id, changed=True)


def would_free(session: Session, row: UpgradeRow) -> int | None:
    """The bytes that a finalize frees now; None where the upgrade takes none."""
    if row.gallery_id is None or Verb.FINALIZE.value not in takes(session, row):
        return None
    return sum(
        segment_rows.older_bytes(session, row.gallery_id, models, newer)
        for _, models, newer in _with_below(session, row, row.gallery_id)
    )


def _with_below(session: Session, row: UpgradeRow, gallery_id: int) -> list[tuple[UpgradeRow, set[int], set[int]]]:
    """An open upgrade and those that it lies on, each with the models that it lets go of and with those that are newer.

    The lowest lets go of the models before it, too: of columns that a finalize had to keep, because there was no newer one
    that could not be taken back.
    """
    stack = upgrade_rows.open_of(session, gallery_id)
    before = upgrade_rows.finalized_sources(session, gallery_id).difference(
        *((each.source_id, each.target_id) for each in stack)
    )
    stack = stack[: [each.id for each in stack].index(row.id) + 1]
    return [
        (each, {each.source_id} if at else before | {each.source_id}, {later.target_id for later in stack[at:]})
        for at, each in enumerate(stack)
    ]


def move(session: Session, row: UpgradeRow, then: State, *, actor: str | None = None, **detail: Any) -> None:
    """Take one step and record it.

    Raises:
        InvalidStateTransition: the step is not allowed.
    """
    step(State(row.state), then)
    row.state, row.active, row.state_since = then, then in ACTIVE and not _ends(row, then), now()
    if then is State.RUNNING and row.started_at is None:
        row.started_at = now()
    if not row.active:
        row.finished_at = now()
        row.progress = asdict(progress(session, row))  # from here on nothing more is done, only undone
    _event(session, row, actor, "state", state=then.value, **detail)
    session.flush()


def complete(session: Session, row: UpgradeRow, gallery: GalleryRow | None, *, actor: str | None = None) -> None:
    """Publish what waits and make the target the gallery's model; the caller holds the gallery's row."""
    session.execute(
        update(ColumnRow)
        .where(ColumnRow.upgrade_id == row.id)
        .values(published=True)
        .execution_options(synchronize_session=False)
    )
    if gallery is not None:
        gallery.model_id = row.target_id
    move(session, row, State.COMPLETED, actor=actor)


def _ends(row: UpgradeRow, then: State) -> bool:
    """A dry run that failed holds nothing that a person would have to resume or cancel."""
    return row.dry_run and then is State.FAILED


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
        use = f"; {unadvised} could, but its fit said that it gains nothing: register its artifact by another name to use it"
        raise errors.WrongTransformation(
            f"{len(sourceless)} segments hold neither {row.source.name} nor {row.target.name} vectors, so this "
            f"transformation cannot bring the whole gallery to the target{use if unadvised else ''}"
        )
    upgrade_rows.add_segments(session, row.id, [(segment.id, segment.rows) for segment in lacking], start=0)


def _asked(thresholds: Sequence[float]) -> dict[str, Any]:
    """What a report holds before anything is measured."""
    waiting = "it is measured before the first segment"
    return {"score_thresholds": [unknown(each, waiting) for each in thresholds]} if thresholds else {}


def _begun(row: UpgradeRow) -> State:
    return State.RUNNING if row.started_at is not None else State.PENDING


def _forgive(session: Session, row: UpgradeRow) -> int:
    failed = upgrade_rows.failures(session, row.id)
    for segment in failed:
        segment.state, segment.attempts = "pending", 0
    row.error = None
    session.flush()
    return len(failed)


def locked(session: Session, upgrade_id: str) -> tuple[UpgradeRow, GalleryRow | None]:
    """Lock the gallery, then the upgrade: always in this order, or two transactions could wait for each other."""
    gallery_id = upgrade_rows.upgrade_row(session, upgrade_id).gallery_id
    gallery = None
    if gallery_id is not None:
        gallery_rows.bump(session, gallery_id)
        gallery = session.get_one(GalleryRow, gallery_id, populate_existing=True)
    return upgrade_rows.upgrade_row(session, upgrade_id, lock=True), gallery


def held(session: Session, upgrade_id: str) -> tuple[UpgradeRow, GalleryRow | None]:
    """As `locked`, but of a dry run the upgrade alone: it changes no gallery, not even its version."""
    row = upgrade_rows.upgrade_row(session, upgrade_id)
    return (upgrade_rows.upgrade_row(session, row.id, lock=True), None) if row.dry_run else locked(session, row.id)


def _undo(
    store: Store, upgrade_id: str, verb: Verb, steps: tuple[State, State], accept_unreachable: bool, actor: str | None
) -> Changed:
    with store.catalog.transaction(verb.value) as tx:
        session = tx.session
        row, gallery = held(session, upgrade_id)
        if not _wants(session, row, verb):
            return Changed(row.id, changed=False)
        if gallery is not None and not accept_unreachable:
            _all_reachable_without(session, row, gallery)
        move(session, row, steps[0], actor=actor, accept_unreachable=accept_unreachable)
        if gallery is not None:
            drop(store, tx, list(session.scalars(select(ColumnRow).where(ColumnRow.upgrade_id == row.id))))
            gallery.model_id = row.source_id
        move(session, row, steps[1], actor=actor)
    return Changed(row.id, changed=True)


def _all_reachable_without(session: Session, row: UpgradeRow, gallery: GalleryRow) -> None:
    """Refuse to go back where queries of the source model would lose items, unless that was accepted."""
    unreachable = item_rows.only_native_in(session, gallery.id, row.target_id)
    if unreachable:
        raise errors.NativeItemsWouldBeUnreachable(
            f"{unreachable} items came natively in {row.target.name}: they stay stored and answer its queries, but "
            f"queries of {row.source.name} are then refused as `no_route`, unless a backward transformation serves them or "
            'they set `allow_partial` and do without these items; repeat with {"accept_unreachable": true}',
            items=unreachable,
        )


def takes(session: Session, row: UpgradeRow) -> list[str]:
    """The verbs that an upgrade takes now."""
    deleted = row.gallery_id is None
    return allowed(State(row.state), dry_run=row.dry_run, above=_above(session, row), deleted=deleted)


def _wants(session: Session, row: UpgradeRow, verb: Verb) -> bool:
    deleted = row.gallery_id is None
    return wants(verb, State(row.state), dry_run=row.dry_run, above=_above(session, row), deleted=deleted)


def _above(session: Session, row: UpgradeRow) -> list[State]:
    return [State(other.state) for other in upgrade_rows.above(session, row)]


def drop(store: Store, tx: Transaction, columns: list[ColumnRow]) -> int:
    """Delete columns; their files go once no row names them. Returns the bytes that this frees."""
    names = [name for column in columns for name in (column.file, column.index_file) if name]
    freed = sum(column.bytes + (column.index_bytes or 0) for column in columns)
    for column in columns:
        tx.session.delete(column)
    tx.session.flush()
    tx.after.append(lambda: store.files.remove(names))
    return freed


def _event(session: Session, row: UpgradeRow, actor: str | None, action: str, **detail: Any) -> None:
    """Whatever is done is done with the artifact that the upgrade is pinned to."""
    audit.record(
        session,
        f"upgrade.{action}",
        gallery=row.gallery_name,
        upgrade_id=row.id,
        actor=actor,
        artifact=row.artifact,
        **detail,
    )
