"""Leases that are renewed while their holder works."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from gallery.store import Store

log = structlog.get_logger()


@contextmanager
def heartbeat(store: Store, of: str, renew: Callable[[Session], bool]) -> Iterator[None]:
    """Renew a lease while the block runs. One that is lost is noticed when publishing; nothing is interrupted.

    Args:
        store: where the lease is.
        of: what is leased, for the log.
        renew: makes the lease last `lease_seconds` from now on; False if it is lost.
    """
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(store.settings.lease_seconds / 3):
            try:
                with store.catalog.transaction() as tx:
                    if not renew(tx.session):
                        return
            except SQLAlchemyError as error:  # the database may be back before the lease ends
                log.warning("heartbeat_missed", of=of, error=repr(error))

    thread = threading.Thread(target=beat, name=f"lease-{of}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
