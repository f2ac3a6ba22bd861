"""The worker process: composition root."""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial

import structlog
from celery import Celery, bootsteps, signals
from celery.worker import state as celery_state

from gallery import columns, faults, folder
from gallery.catalog import schema
from gallery.catalog.transaction import UNANSWERED, Catalog, in_words
from gallery.files import Files
from gallery.settings import GallerySettings
from gallery.store import Store
from gallery.transforms import Transforms
from models.arithmetic import Rule
from models.runtime import load_transform
from workers.app import create_app
from workers.devices import chosen
from workers.fitting import fit_pairs
from workers.settings import WorkerSettings
from workers.tasks import Worker, register, watch

log = structlog.get_logger()
_LOOK_SECONDS = 1.0


def run() -> None:
    """Work until SIGTERM. The step under way is finished first; a second signal, or SIGKILL, loses only its time.

    Raises:
        NewerSchemaError: the catalog is of a newer version.
        ForeignFolderError: the data folder is not the catalog's.
        SystemExit: Celery ended though nobody told the worker to stop.
    """
    faults.arm(os.environ.get(faults.VARIABLE))
    columns.open_many()
    settings, gallery_settings = WorkerSettings(), GallerySettings()
    files, device = Files(gallery_settings.data), chosen(settings.device, gallery_settings.data)
    rule = Rule(settings.computed_in, settings.largest_error)
    store = Store(
        catalog=Catalog(gallery_settings.database),
        files=files,
        transforms=Transforms(files, partial(load_transform, device=device, rule=rule)),
        settings=gallery_settings,
    )
    worker = Worker(store, settings, partial(fit_pairs, device=device))
    app = create_app(settings, gallery_settings.data)
    register(app, worker)
    _until_migrated(store.catalog)
    folder.claim(store.catalog, files)

    _heed_signals(worker)
    _keep_hangup(app)
    # Celery leaves logging alone if this signal has a receiver.
    signals.setup_logging.connect(lambda **_: None, weak=False)
    # Celery's signal handlers print to it: bare text, and if nobody reads the pipe they would block, and not stop the worker.
    sys.__stdout__ = None  # type: ignore[misc]
    log.info("worker_started", owner=worker.owner, device=device)
    watching = watch(worker, settings.sweep_seconds)
    # Solo: tasks run in this very process, whose one working thread they wake.
    # Quiet: it would print a banner, which is no line of a log, and would end if it cannot be printed.
    app.worker_main(
        [
            "--quiet",
            "worker",
            "--pool=solo",
            "--loglevel=WARNING",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
        ]
    )
    told = worker.stopping
    worker.stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    watching.join()
    if not told:
        raise SystemExit(1)


def _heed_signals(worker: Worker) -> None:
    """Make SIGTERM and Ctrl-C stop the worker: by Celery's handlers, and by ours until Celery has set its own."""

    def stopping(**_: object) -> None:
        worker.stop()

    def early(*_: object) -> None:
        worker.stop()
        celery_state.should_stop = os.EX_OK

    signals.worker_shutting_down.connect(stopping, weak=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, early)


def _keep_hangup(app: Celery) -> None:
    """Leave SIGHUP to whoever had it. Celery would start the program again at it, with standard output closed: it would work on,
    and nobody would hear of it any more.
    """
    before = signal.getsignal(signal.SIGHUP)

    class Kept(bootsteps.StartStopStep):  # type: ignore[misc,unused-ignore]
        def start(self, _: object) -> None:
            signal.signal(signal.SIGHUP, before)

    app.steps["worker"].add(Kept)


def _until_migrated(catalog: Catalog) -> None:
    """Wait until someone has migrated the catalog, such as a service that starts at the same time.

    A database that does not answer is waited for too. What is no catalog at all is an error.
    """
    said: str | None = None
    while True:
        try:
            if schema.is_current(catalog):
                return
            lacks = "waiting for a service on SQLite, or for `forwardfill migrate`"
            if lacks != said:
                log.warning("schema_is_old", detail=lacks)
        except UNANSWERED as error:
            lacks = in_words(error)
            if lacks != said:
                log.warning("look_failed", error=lacks)
        said = lacks
        time.sleep(_LOOK_SECONDS)
