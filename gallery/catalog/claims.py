"""A lock for files that belong to no gallery: artifacts, and the pairs of fits.

A file that no row names is removed as an orphan. So while a transaction is about to name such files, none may be removed, and
the other way round. A gallery's own files are guarded by the lock on its row. SQLite has one writer at a time, and needs no lock.
"""

from __future__ import annotations

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

_LOCK = 0x0F0F_F112  # any number, as long as every process uses the same, and `schema` another


def hold(session: Session) -> None:
    """Take the lock to name files, until this transaction ends. Any number of transactions may do so at once."""
    if _shared(session):
        session.execute(select(func.pg_advisory_xact_lock_shared(_LOCK)))


def free(session: Session) -> bool:
    """Take the lock to remove files, until this transaction ends; False if a transaction is about to name some."""
    removing: Select[tuple[bool]] = select(func.pg_try_advisory_xact_lock(_LOCK))
    return not _shared(session) or bool(session.scalar(removing))


def _shared(session: Session) -> bool:
    return session.get_bind().dialect.name == "postgresql"
