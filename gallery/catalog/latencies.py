"""Rows of search latencies: what API processes tell the throttle of an upgrade."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from gallery.catalog.tables import SearchLatencyRow, UpgradeRow, now

_FRESH = timedelta(seconds=10)  # a measurement that is older is of a process that ended


def watched(session: Session) -> set[int]:
    """Galleries with an active upgrade that is held back by slow searches."""
    rows = session.execute(select(UpgradeRow.gallery_id, UpgradeRow.throttle).where(UpgradeRow.active))
    return {gallery for gallery, throttle in rows if gallery is not None and "max_search_p99_ms" in throttle}


def publish(session: Session, process: str, p99_ms: Mapping[int, float]) -> None:
    """Renew what a process measured, per gallery."""
    for gallery, value in p99_ms.items():
        session.merge(SearchLatencyRow(process=process, gallery_id=gallery, p99_ms=value, at=now()))
    session.flush()


def slowest_search_ms(session: Session, gallery_id: int | None) -> float | None:
    """The largest p99 that an API process measured of late.

    A live process writes its own each second. So a measurement from the future is of a process that ended before the clock was
    set back, and does not count.
    """
    moment = now()
    return session.scalar(
        select(func.max(SearchLatencyRow.p99_ms)).where(
            SearchLatencyRow.gallery_id == gallery_id,
            SearchLatencyRow.at > moment - _FRESH,
            SearchLatencyRow.at < moment + _FRESH,
        )
    )


def forget(session: Session, process: str) -> None:
    """Remove what a process measured: it ends."""
    session.execute(delete(SearchLatencyRow).where(SearchLatencyRow.process == process))
