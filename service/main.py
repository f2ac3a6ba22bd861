"""The API process: read the settings, open the catalog, serve."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import structlog

from gallery import columns, faults, folder
from gallery.settings import GallerySettings
from service import server
from service.app import build_store, create_app
from service.group import Group, own_sockets, shared_sockets
from service.ready import make_ready
from service.settings import ServiceSettings
from service.telemetry import configure_logs, pass_on_libraries
from workers.app import create_app as create_celery
from workers.queue import Queue
from workers.settings import WorkerSettings

log = structlog.get_logger()

# How long threads that have nothing to do may take to end.
_IDLE_SECONDS = 1.0


def run(*, beside: Callable[[], AbstractContextManager[None]] | None = None, group: Group | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    If a request still runs in a thread when the time to stop is over, this does not return: it ends the process.

    Args:
        beside: entered once the catalog is ready, left when the service has ended; the embedded worker.
        group: this process's place among several behind one port; whoever started them has made all ready.

    Raises:
        OldSchemaError, NewerSchemaError, UnsafeBinding: as `make_ready`.
        ForeignFolderError: as `folder.claim`.
        PortTakenError: as `own_sockets`.
    """
    configure_logs()
    pass_on_libraries()
    faults.arm(os.environ.get(faults.VARIABLE))
    columns.open_many()
    settings, gallery_settings, workers = ServiceSettings(), GallerySettings(), WorkerSettings()
    store = build_store(gallery_settings, workers)
    try:
        if group is None:
            make_ready(store.catalog, settings)
        folder.claim(store.catalog, store.files)
        # Bound before the worker is started, which would be in vain if the port is taken.
        sockets = (own_sockets if group is None else shared_sockets)(settings.host, settings.port)
        queue = Queue(create_celery(workers, gallery_settings.data))
        with beside() if beside else nullcontext():
            server.run(create_app(store, settings, nudge=queue.nudge, group=group), sockets)
    finally:
        store.catalog.close()
    _abandon()


def _abandon() -> None:
    """End the process now if a thread is at work: it cannot be cancelled, and the interpreter would wait for it.

    Nothing that it does was acknowledged, and what is half written is what `kill -9` would leave.
    """
    end = time.monotonic() + _IDLE_SECONDS
    others = [each for each in threading.enumerate() if each is not threading.current_thread() and not each.daemon]
    for each in others:
        each.join(max(0.0, end - time.monotonic()))
    busy = sum(each.is_alive() for each in others)
    if busy:
        log.warning("requests_abandoned", threads=busy)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
