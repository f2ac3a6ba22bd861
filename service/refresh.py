"""Watches what other processes write: gallery versions, keys, and whether an upgrade wants to know how slow searches are."""

from __future__ import annotations

import threading
import time

import structlog
from ulid import ULID

from gallery.catalog import latencies as latency_rows
from gallery.snapshot import Galleries
from gallery.store import Store
from service.auth import Keyring
from service.telemetry import Latencies

log = structlog.get_logger()

_PUBLISH_SECONDS = 1.0


class Refresher:
    """A thread between `start` and `stop`. Searches read what it last swapped in, and never wait for it."""

    def __init__(
        self, store: Store, galleries: Galleries, keyring: Keyring, latencies: Latencies, *, every_seconds: float
    ) -> None:
        """Watch for changes every `every_seconds`."""
        self._store = store
        self._galleries = galleries
        self._keyring = keyring
        self._latencies = latencies
        self._every = every_seconds
        self._process = str(ULID())
        self._published = 0.0
        self._told = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="refresher", daemon=True)

    def start(self) -> None:
        """Read everything once, then watch.

        Raises:
            Damaged: a recorded file is missing.
        """
        self._keyring.refresh()
        self._galleries.refresh()
        self._thread.start()

    def stop(self) -> None:
        """Stop watching, and take back what was published."""
        self._stop.set()
        self._thread.join()
        if self._told:
            with self._store.catalog.transaction() as tx:
                latency_rows.forget(tx.session, self._process)

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            try:
                self._look()
            except Exception:  # whatever went wrong, the next look may go well, and searches go on with what there is
                log.exception("refresh_failed")

    def _look(self) -> None:
        self._keyring.refresh()
        self._galleries.refresh()
        if time.monotonic() - self._published >= _PUBLISH_SECONDS:
            self._published = time.monotonic()
            self._publish()

    def _publish(self) -> None:
        """Tell how slow searches are, but only where an upgrade asks for it: otherwise this writes nothing."""
        with self._store.catalog.reading() as session:
            watched = latency_rows.watched(session)
        if watched:
            self._told = True
            p99_ms = {gallery: self._latencies.p99_ms(gallery) for gallery in watched}
            with self._store.catalog.transaction() as tx:
                latency_rows.publish(tx.session, self._process, p99_ms)
