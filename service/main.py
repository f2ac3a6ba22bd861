"""The API process: read the settings, open the catalog, serve."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import structlog

from gallery import faults
from gallery.catalog import schema
from gallery.settings import GallerySettings
from service import auth, server
from service.app import build_store, create_app
from service.group import Group
from service.settings import ServiceSettings
from service.telemetry import configure_logs
from workers.app import create_app as create_celery
from workers.queue import Queue
from workers.settings import WorkerSettings

log = structlog.get_logger()


class OldSchemaError(Exception):
    """The catalog's database is not of this version; run `forwardfill migrate`."""


def run(*, beside: Callable[[], AbstractContextManager[None]] | None = None, group: Group | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        beside: entered once the catalog is ready, left when the service has ended; the embedded worker.
        group: this process's place among several behind one port; whoever started them has migrated SQLite.

    Raises:
        UnsafeBinding: it would listen beyond loopback without a key.
        OldSchemaError: a PostgreSQL catalog is not of this version.
    """
    configure_logs()
    faults.arm(os.environ.get(faults.VARIABLE))
    settings, gallery_settings = ServiceSettings(), GallerySettings()
    store = build_store(gallery_settings)
    try:
        # SQLite belongs to this process; a database that several share is migrated when an operator says so.
        if store.catalog.engine.dialect.name == "sqlite" and group is None:
            schema.migrate(store.catalog)
        elif not schema.is_current(store.catalog):
            raise OldSchemaError(OldSchemaError.__doc__)
        auth.require_safe_binding(settings.host, has_keys=auth.has_keys(store.catalog), insecure=settings.insecure)
        queue = Queue(create_celery(WorkerSettings()))
        with beside() if beside else nullcontext():
            server.run(create_app(store, settings, nudge=queue.nudge, group=group), shared=group is not None)
    finally:
        store.catalog.close()
