"""A gallery is deleted: with its upgrade, its rows and its files."""

from __future__ import annotations

from gallery.catalog import audit
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.store import Store
from gallery.upgrade.moves import move
from gallery.upgrade.states import State


def delete_gallery(store: Store, name: str, *, actor: str | None = None) -> None:
    """Delete a gallery; its upgrade is cancelled first."""
    with store.catalog.transaction() as tx:
        gallery = gallery_rows.gallery_row(tx.session, name)
        gallery_rows.bump(tx.session, gallery.id)
        active = upgrade_rows.active_of(tx.session, gallery.id)
        # Looked at again once it is locked: a worker ends a dry run without a lock on the gallery.
        if active is not None and upgrade_rows.upgrade_row(tx.session, active.id, lock=True).active:
            move(tx.session, active, State.CANCELLING, actor=actor)
            move(tx.session, active, State.CANCELLED, actor=actor)
        names = gallery_rows.files_of(tx.session, gallery.id)
        audit.record(tx.session, "gallery.deleted", gallery=name, actor=actor)
        tx.session.flush()
        gallery_rows.remove(tx.session, gallery.id)
        tx.after.append(lambda: store.files.remove(names))
