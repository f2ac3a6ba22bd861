"""The API process: read the settings, open the catalog, serve."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import structlog

from gallery import faults
from gallery.settings import GallerySettings
from service import server
from service.app import build_store, create_app
from service.group import Group
from service.ready import make_ready
from service.settings import ServiceSettings
from service.telemetry import configure_logs
from workers.app import create_app as create_celery
from workers.queue import Queue
from workers.settings import WorkerSettings

log = structlog.get_logger()


def run(*, beside: Callable[[], AbstractContextManager[None]] | None = None, group: Group | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        beside: entered once the catalog is ready, left when the service has ended; the embedded worker.
        group: this process's place among several behind one port; whoever started them has made all ready.

    Raises:
        OldSchemaError, NewerSchemaError, UnsafeBinding: as `make_ready`.
    """
    configure_logs()
    faults.arm(os.environ.get(faults.VARIABLE))
    settings, gallery_settings = ServiceSettings(), GallerySettings()
    store = build_store(gallery_settings)
    try:
        if group is None:
            make_ready(store.catalog, settings)
        queue = Queue(create_celery(WorkerSettings(), gallery_settings.data))
        with beside() if beside else nullcontext():
            server.run(create_app(store, settings, nudge=queue.nudge, group=group), shared=group is not None)
    finally:
        store.catalog.close()
