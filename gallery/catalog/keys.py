"""Rows of API keys. A key is 256 random bits, so its plain SHA-256 is as good as any slow hash: nothing can be guessed."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from gallery import errors
from gallery.catalog.tables import KeyRow, now


def add_key(session: Session, *, name: str, scope: str, sha256: str) -> None:
    """Record a key.

    Raises:
        KeyExists: a key has the name, perhaps a revoked one: the audit trail must not confuse two.
    """
    if session.scalar(select(KeyRow).where(KeyRow.name == name)) is not None:
        raise errors.KeyExists(f"a key is named {name!r} already, perhaps a revoked one; choose another name")
    session.add(KeyRow(name=name, scope=scope, sha256=sha256))
    session.flush()


def all_keys(session: Session) -> list[KeyRow]:
    """Every key that was ever made, revoked ones included, oldest first."""
    return list(session.scalars(select(KeyRow).order_by(KeyRow.id)))


def keys_made(session: Session) -> int:
    """How many keys were ever made."""
    return session.scalar(select(func.count()).select_from(KeyRow)) or 0


def revoke_key(session: Session, name: str) -> bool:
    """Take a key back; False if it was revoked before.

    Raises:
        KeyNotFound: none has the name.
    """
    row = session.scalar(select(KeyRow).where(KeyRow.name == name))
    if row is None:
        raise errors.KeyNotFound(f"no key is named {name!r}")
    if row.revoked_at is not None:
        return False
    row.revoked_at = now()
    session.flush()
    return True
