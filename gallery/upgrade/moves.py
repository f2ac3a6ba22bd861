"""What is done to the row of an upgrade within a transaction, by verbs and by workers: locked, moved, recorded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NamedTuple

from sqlalchemy import update
from sqlalchemy.orm import Session

from gallery import errors
from gallery.catalog import audit
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ColumnRow, GalleryRow, UpgradeRow, now
from gallery.catalog.transaction import Transaction
from gallery.store import Store
from gallery.upgrade import states
from gallery.upgrade.progress import progress
from gallery.upgrade.states import ACTIVE, State, Verb


class Changed(NamedTuple):
    """The upgrade after a verb, and whether the verb did anything."""

    upgrade_id: str
    changed: bool


def locked(session: Session, upgrade_id: str) -> tuple[UpgradeRow, GalleryRow | None]:
    """Lock the gallery, then the upgrade: always in this order, or two transactions could wait for each other."""
    gallery_id = upgrade_rows.upgrade_row(session, upgrade_id).gallery_id
    gallery = None
    if gallery_id is not None:
        with suppress(errors.GalleryNotFound):  # deleted since that look, as the upgrade's row says by now
            gallery_rows.bump(session, gallery_id)
            gallery = session.get_one(GalleryRow, gallery_id, populate_existing=True)
    return upgrade_rows.upgrade_row(session, upgrade_id, lock=True), gallery


def held(session: Session, upgrade_id: str) -> tuple[UpgradeRow, GalleryRow | None]:
    """As `locked`; but for a dry run, which changes no gallery and no version, only the upgrade is locked."""
    row = upgrade_rows.upgrade_row(session, upgrade_id)
    return (upgrade_rows.upgrade_row(session, row.id, lock=True), None) if row.dry_run else locked(session, row.id)


def takes(row: UpgradeRow, stack: Sequence[UpgradeRow]) -> list[str]:
    """The verbs that an upgrade takes now, among the open upgrades of its gallery."""
    deleted = row.gallery_id is None
    return states.allowed(State(row.state), dry_run=row.dry_run, above=_above(row, stack), deleted=deleted)


def wanted(session: Session, row: UpgradeRow, verb: Verb) -> bool:
    """Whether the verb has something to do now, by the rules of `states.wants`."""
    deleted = row.gallery_id is None
    return states.wants(
        verb,
        State(row.state),
        dry_run=row.dry_run,
        above=_above(row, upgrade_rows.stack_of(session, row)),
        deleted=deleted,
    )


def move(session: Session, row: UpgradeRow, then: State, *, actor: str | None = None, **detail: Any) -> None:
    """Take one step and record it.

    Raises:
        InvalidStateTransition: the step is not allowed.
    """
    row.state, row.state_since = states.step(State(row.state), then), now()
    row.active = then in ACTIVE and not _ends(row, then)
    if then is State.RUNNING and row.started_at is None:
        row.started_at = now()
    if not row.active:
        row.finished_at = now()
        row.progress = asdict(progress(session, row))  # from here on nothing more is done, only undone
    event(session, row, actor, "state", state=then.value, **detail)
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


def drop(store: Store, tx: Transaction, columns: list[ColumnRow]) -> int:
    """Delete columns; their files go once no row names them. Returns the bytes that this frees."""
    names = [name for column in columns for name in (column.file, column.index_file) if name]
    freed = sum(column.bytes + (column.index_bytes or 0) for column in columns)
    for column in columns:
        tx.session.delete(column)
    tx.session.flush()
    tx.after.append(lambda: store.files.remove(names))
    return freed


def event(session: Session, row: UpgradeRow, actor: str | None, action: str, **detail: Any) -> None:
    """Record an event of an upgrade, with the artifact that it is pinned to."""
    audit.record(
        session,
        f"upgrade.{action}",
        gallery=row.gallery_name,
        upgrade_id=row.id,
        actor=actor,
        artifact=row.artifact,
        **detail,
    )


def _ends(row: UpgradeRow, then: State) -> bool:
    """Whether a state is the end of a run: a dry run that failed does not wait for a person to resume or cancel it."""
    return row.dry_run and then is State.FAILED


def _above(row: UpgradeRow, stack: Sequence[UpgradeRow]) -> list[State]:
    return [State(other.state) for other in upgrade_rows.above(row, stack)]
