"""Idempotency keys: a request that a client sends once more, since it got no answer, starts nothing new."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery import errors
from gallery.catalog.tables import FitRow, UpgradeRow


def started_by(
    session: Session, rows: type[UpgradeRow] | type[FitRow], key: str | None, request_sha256: str | None
) -> str | None:
    """The id of what this very request started before, among `rows`.

    Raises:
        IdempotencyKeyReused: the key came with another request.
    """
    if key is None:
        return None
    known = session.execute(select(rows.id, rows.request_sha256).where(rows.idempotency_key == key)).first()
    if known is None:
        return None
    if known.request_sha256 != request_sha256:
        raise errors.IdempotencyKeyReused("this Idempotency-Key came with another request before; use a new one")
    return str(known.id)
