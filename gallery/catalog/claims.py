"""Files of no gallery, artifacts and the pairs of fits: who is about to name some, and who removes some, keep each other off.

Those of a gallery are guarded by its row. On SQLite nobody writes beside another anyway.
"""

from __future__ import annotations

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

_LOCK = 0x0F0F_F112  # any number, as long as every process uses the same, and `schema` another


def hold(session: Session) -> None:
    """Let none be removed until this transaction has ended; any number may name some at once."""
    if _shared(session):
        session.execute(select(func.pg_advisory_xact_lock_shared(_LOCK)))


def free(session: Session) -> bool:
    """Let none be named until this transaction has ended, if nobody is about to."""
    removing: Select[tuple[bool]] = select(func.pg_try_advisory_xact_lock(_LOCK))
    return not _shared(session) or bool(session.scalar(removing))


def _shared(session: Session) -> bool:
    return session.get_bind().dialect.name == "postgresql"
