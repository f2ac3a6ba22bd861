"""The verbs of an upgrade, each one transaction.

Cancel, cutover, rollback and finalize touch rows only, a few per segment, so they are done when they are answered:
`cancelling` and `rolling_back` are passed through within the transaction, and files are removed after it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery import errors
from gallery.catalog import items as item_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ColumnRow, GalleryRow, UpgradeRow, now
from gallery.store import Store
from gallery.upgrade import throttle
from gallery.upgrade.gate import waived
from gallery.upgrade.moves import Changed, complete, drop, event, held, locked, move, takes, wanted
from gallery.upgrade.states import State, Verb


def pause(store: Store, upgrade_id: str, *, actor: str | None = None) -> Changed:
    """Lease no more segments; the one under way finishes."""
    with store.catalog.transaction() as tx:
        row = upgrade_rows.upgrade_row(tx.session, upgrade_id, lock=True)
        if not wanted(tx.session, row, Verb.PAUSE):
            return Changed(row.id, changed=False)
        move(tx.session, row, State.PAUSED, actor=actor)
    return Changed(row.id, changed=True)


def resume(store: Store, upgrade_id: str, *, actor: str | None = None) -> Changed:
    """Go on where it stopped; after a failure, with another try for what failed.

    An upgrade that its gate stopped after it had begun goes on in spite of the gate.
    """
    with store.catalog.transaction() as tx:
        row = upgrade_rows.upgrade_row(tx.session, upgrade_id, lock=True)
        if not wanted(tx.session, row, Verb.RESUME):
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
        if not wanted(tx.session, row, Verb.RETRY):
            return Changed(row.id, changed=False)
        forgiven = _forgive(tx.session, row)
        if row.state == State.FAILED:
            move(tx.session, row, _begun(row), actor=actor)
        elif forgiven == 0:
            return Changed(row.id, changed=False)
        else:
            event(tx.session, row, actor, "retried", segments=forgiven)
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
                f"an upgrade that is {row.state} has nothing to throttle",
                allowed=takes(row, upgrade_rows.stack_of(tx.session, row)),
            )
        before, following = row.throttle, upgrade_rows.next_free(tx.session, row.id, store.settings.lease_seconds)
        row.throttle = {name: value for name, value in {**row.throttle, **limits}.items() if value is not None}
        rows, moment = None if following is None else following.rows, now()
        waits = throttle.believed(row.not_before, row.not_before_set_at, moment)
        row.not_before = throttle.after_change(before, row.throttle, rows, waits, moment)
        row.not_before_set_at = moment
        event(tx.session, row, actor, "throttled", throttle=row.throttle)


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
        if not wanted(tx.session, row, Verb.CUTOVER):
            return Changed(row.id, changed=False)
        admit(row)
        complete(tx.session, row, gallery, actor=actor)
    return Changed(row.id, changed=True)


def finalize(store: Store, upgrade_id: str, *, actor: str | None = None) -> Changed:
    """Delete the older models' columns. There is no way back then, and their bytes are free.

    Upgrades that this one started on top of are finalized with it. A segment that was skipped keeps its newest column, or its
    items would be lost.
    """
    with store.catalog.transaction("finalize") as tx:
        row, gallery = locked(tx.session, upgrade_id)
        if not wanted(tx.session, row, Verb.FINALIZE) or gallery is None:  # without one, nothing is wanted
            return Changed(row.id, changed=False)
        before = upgrade_rows.finalized_sources(tx.session, gallery.id)
        for each, models, newer in _with_below(row, upgrade_rows.open_of(tx.session, gallery.id), before):
            freed = drop(store, tx, segment_rows.older(tx.session, gallery.id, models, newer))
            each.report = {**each.report, "bytes_freed": freed, **({} if each is row else {"finalized_with": row.id})}
            move(tx.session, each, State.FINALIZED, actor=actor, bytes_freed=freed)
    return Changed(row.id, changed=True)


def would_free(session: Session, row: UpgradeRow, stack: Sequence[UpgradeRow]) -> int | None:
    """The bytes that a finalize frees now; None where the upgrade takes none, among the open upgrades of its gallery."""
    if row.gallery_id is None or Verb.FINALIZE.value not in takes(row, stack):
        return None
    before = upgrade_rows.finalized_sources(session, row.gallery_id)
    deleted = [(models, newer) for _, models, newer in _with_below(row, stack, before)]
    return segment_rows.older_bytes(session, row.gallery_id, deleted)


def _with_below(
    row: UpgradeRow, stack: Sequence[UpgradeRow], finalized: Collection[int]
) -> list[tuple[UpgradeRow, set[int], set[int]]]:
    """An open upgrade and those below it, each with the models whose columns it deletes, and the models that are newer.

    A column is deleted only from segments that have a newer one. The lowest upgrade also deletes columns of the models before it,
    which an earlier finalize had to keep: their segments had no newer column that could not be rolled back.
    """
    before = set(finalized).difference(*((each.source_id, each.target_id) for each in stack))
    below = stack[: [each.id for each in stack].index(row.id) + 1]
    return [
        (each, {each.source_id} if at else before | {each.source_id}, {later.target_id for later in below[at:]})
        for at, each in enumerate(below)
    ]


def _begun(row: UpgradeRow) -> State:
    return State.RUNNING if row.started_at is not None else State.PENDING


def _forgive(session: Session, row: UpgradeRow) -> int:
    failed = upgrade_rows.failures(session, row.id)
    for segment in failed:
        segment.state, segment.attempts = "pending", 0
    row.error = None
    session.flush()
    return len(failed)


def _undo(
    store: Store, upgrade_id: str, verb: Verb, steps: tuple[State, State], accept_unreachable: bool, actor: str | None
) -> Changed:
    with store.catalog.transaction(verb.value) as tx:
        session = tx.session
        row, gallery = held(session, upgrade_id)
        if not wanted(session, row, verb):
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
