"""Watches what other processes write, gallery versions and keys, and tells them of the searches here.

It tells them three things: its counts, to the processes behind the same port; where hits were found, which the order of an
upgrade may follow; and, if an upgrade asks for it, how slow searches are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy.exc import SQLAlchemyError
from ulid import ULID

from gallery.catalog import latencies as latency_rows
from gallery.catalog.transaction import in_words
from gallery.snapshot import Galleries
from gallery.store import Store
from service.keys import Keyring
from service.metrics import Metrics
from workers.memory import give_back

log = structlog.get_logger()

_PUBLISH_SECONDS = 1.0
# Seldom, because which rows are hit most changes slowly, and on SQLite each write takes the one lock that all writers share.
_HITS_SECONDS = 30.0
# Answers with thousands of hits leave holes in the heap of the thread that made them, which would never shrink by itself.
_GIVE_BACK_SECONDS = 10.0
# How long the catalog may take to be written to for the last time, when the process ends.
_LAST_SECONDS = 5.0


class Refresher:
    """Threads between `start` and `stop`. Searches read what was last swapped in, and never wait for it.

    One watches, one writes to the catalog and gives memory back, one shares counts with the processes behind the same port, and
    one warms up. They are apart because a write to the catalog may have to wait for a long one of another process, and what
    others wrote must be seen meanwhile.
    """

    def __init__(
        self,
        store: Store,
        galleries: Galleries,
        keyring: Keyring,
        metrics: Metrics,
        *,
        every_seconds: float,
        warm_up: Callable[[], None] = lambda: None,
    ) -> None:
        """Watch for changes every `every_seconds`; call `warm_up`, in a thread, once there is a transformation to apply."""
        self._store = store
        self._galleries = galleries
        self._keyring = keyring
        self._metrics = metrics
        self._process = str(ULID())
        self._hits_written = self._given_back = time.monotonic()
        self._told = False
        self._warm_up = threading.Thread(target=warm_up, name="warm-up", daemon=True)
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=work, name=name, daemon=True)
            for name, work in {
                "watch": (self._look, every_seconds),
                "tell": (self._tell, _PUBLISH_SECONDS),
                "share": (metrics.share, _PUBLISH_SECONDS),
            }.items()
        ]

    def start(self) -> None:
        """Read everything once, then watch.

        Raises:
            Damaged: a recorded file is missing.
        """
        self._look()
        self._metrics.share()  # tells whoever started this process that it can serve now
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop the threads, write the last counts and hits, and remove the latencies that this process published.

        It does not wait for a catalog that hangs.
        """
        self._stop.set()
        if self._warm_up.ident is not None:  # an import must not be cut off by the end of the interpreter
            self._warm_up.join()
        last = threading.Thread(target=self._last_words, name="last-words", daemon=True)
        last.start()
        last.join(_LAST_SECONDS)
        if last.is_alive():
            log.warning("last_words_lost", error=f"the catalog did not answer within {_LAST_SECONDS:g} s")

    def _last_words(self) -> None:
        for thread in self._threads:
            thread.join()
        try:
            self._metrics.share()
            self._metrics.hits.write(self._store.catalog)
            if self._told:
                with self._store.catalog.transaction() as tx:
                    latency_rows.forget(tx.session, self._process)
        except (OSError, SQLAlchemyError) as error:  # what is gone must not keep the process from ending in good order
            log.warning("last_words_lost", error=in_words(error))

    def _run(self, act: Callable[[], None], every_seconds: float) -> None:
        while not self._stop.wait(every_seconds):
            try:
                act()
            except Exception:  # whatever went wrong, the next time may go well, and searches go on with what there is
                log.exception("refresh_failed")

    def _look(self) -> None:
        self._keyring.refresh()
        world = self._galleries.refresh()
        if world.registry.transformations and self._warm_up.ident is None:
            self._warm_up.start()

    def _tell(self) -> None:
        self._tell_latencies()
        if time.monotonic() - self._hits_written >= _HITS_SECONDS:
            self._hits_written = time.monotonic()
            self._metrics.hits.write(self._store.catalog)
        if time.monotonic() - self._given_back >= _GIVE_BACK_SECONDS:
            self._given_back = time.monotonic()
            give_back()

    def _tell_latencies(self) -> None:
        """Only where an upgrade asks for them: otherwise this writes nothing."""
        with self._store.catalog.reading() as session:
            watched = latency_rows.watched(session)
        if watched:
            self._told = True
            p99_ms = {gallery: self._metrics.latencies.p99_ms(gallery) for gallery in watched}
            with self._store.catalog.transaction() as tx:
                latency_rows.publish(tx.session, self._process, p99_ms)
