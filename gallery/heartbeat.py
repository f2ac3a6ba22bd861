"""Leases that are renewed while their holder works."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from gallery.catalog.transaction import in_words
from gallery.store import Store

log = structlog.get_logger()


class Stopped(Exception):
    """A step of work was given up, because the worker was told to stop or has lost its lease."""


@contextmanager
def heartbeat(store: Store, of: str, renew: Callable[[Session], bool]) -> Iterator[threading.Event]:
    """Renew a lease while the block runs; gives an event that is set if the lease is lost.

    A lost lease does not interrupt the block. Whoever publishes notices it, and whoever looks at the event.

    Args:
        store: where the lease is.
        of: what is leased, for the log.
        renew: makes the lease last `lease_seconds` from now on; False if it is lost.
    """
    stop, lost = threading.Event(), threading.Event()

    def beat() -> None:
        while not stop.wait(store.settings.lease_seconds / 3):
            try:
                with store.catalog.transaction() as tx:
                    if not renew(tx.session):
                        lost.set()
                        return
            except SQLAlchemyError as error:  # the database may be back before the lease ends
                log.warning("heartbeat_missed", of=of, error=in_words(error))

    thread = threading.Thread(target=beat, name=f"lease-{of}", daemon=True)
    thread.start()
    try:
        yield lost
    finally:
        stop.set()
        thread.join()
