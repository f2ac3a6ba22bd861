"""Rows of search latencies: what API processes tell the throttle of an upgrade."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from gallery.catalog.tables import SearchLatencyRow, UpgradeRow, now


def watched(session: Session) -> set[int]:
    """Galleries with an active upgrade that is held back by slow searches."""
    rows = session.execute(select(UpgradeRow.gallery_id, UpgradeRow.throttle).where(UpgradeRow.active))
    return {gallery for gallery, throttle in rows if gallery is not None and "max_search_p99_ms" in throttle}


def publish(session: Session, process: str, p99_ms: Mapping[int, float]) -> None:
    """Renew what a process measured, per gallery."""
    for gallery, value in p99_ms.items():
        session.merge(SearchLatencyRow(process=process, gallery_id=gallery, p99_ms=value, at=now()))
    session.flush()


def forget(session: Session, process: str) -> None:
    """Remove what a process measured: it ends."""
    session.execute(delete(SearchLatencyRow).where(SearchLatencyRow.process == process))
