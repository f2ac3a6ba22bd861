"""The composition root of the API process: what it is made of, and in which order it starts and stops."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib.util
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio.to_thread
import numpy.ma  # noqa: F401 - else NumPy imports it in a search, and that fails if two threads do it at once
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from gallery.catalog.transaction import Catalog
from gallery.files import Files
from gallery.group_commit import GroupCommit
from gallery.index.device import Device, Gpu
from gallery.index.faiss_gpu import open_faiss
from gallery.search.coalesce import Coalescer
from gallery.search.run import Searcher
from gallery.settings import GallerySettings
from gallery.snapshot import Galleries
from gallery.store import Store
from gallery.together import Together
from gallery.transforms import Transforms
from service import documents, errors
from service.api import (
    artifacts,
    audit,
    dashboard,
    explain,
    fits,
    galleries,
    health,
    items,
    models,
    search,
    stream,
    transformations,
    upgrades,
)
from service.catch_up import CatchUp
from service.express import Express
from service.gather import Gatherer
from service.group import Group
from service.keys import Keyring
from service.metrics import Metrics
from service.process import Process
from service.refresh import Refresher
from service.settings import ServiceSettings
from service.slots import Room, Slots
from service.telemetry import Telemetry
from workers.settings import WorkerSettings

if TYPE_CHECKING:
    from models.runtime import Transform

#: searches come first, because a path is compared with one route after another
SUBJECTS = (
    search,
    items,
    fits,
    models,
    artifacts,
    transformations,
    galleries,
    explain,
    upgrades,
    stream,
    audit,
    health,
    dashboard,
)
_SPARE_THREADS = 8  # for health, and for streams that look at the catalog
_DESCRIPTION = "A gallery of embeddings that stays searchable while it moves to another embedding model."


def build_store(settings: GallerySettings, workers: WorkerSettings | None = None) -> Store:
    """A store whose transformations run on this process's CPU, in the number types that `workers` may use."""
    files, numbers = Files(settings.data), workers or WorkerSettings()
    load = partial(_load, computed_in=numbers.computed_in, largest_error=numbers.largest_error)
    return Store(Catalog(settings.database), files, Transforms(files, load), settings)


def _load(path: Path, computed_in: Literal["auto", "float32", "bfloat16"], largest_error: float) -> Transform:
    """An artifact as a function. PyTorch takes as long to import as all the rest, so only a transformation imports it."""
    from models.arithmetic import Rule  # noqa: PLC0415
    from models.runtime import load_transform  # noqa: PLC0415

    return load_transform(path, rule=Rule(computed_in, largest_error))


def _open_torch(number: int) -> Gpu | None:
    """A GPU as PyTorch uses it. PyTorch is not imported if there is no driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    from models.nearest import open_torch  # noqa: PLC0415

    return open_torch(number)


def _import_pytorch() -> None:
    """Import PyTorch, which takes seconds, before a search waits for it. Searches go on meanwhile."""
    _load_without_the_interpreter()
    gc.disable()  # it would walk over what is being imported, during which nothing else runs
    try:
        import models.runtime  # noqa: F401, PLC0415
    finally:
        gc.enable()
    if gc.get_freeze_count():  # this too stays for good, as what `server` froze
        gc.freeze()


def _load_without_the_interpreter() -> None:
    """Load PyTorch's largest library without the interpreter's lock: an import holds it, and all else up, for 0.2 s.

    Where that cannot be done, the import does it.
    """
    found = importlib.util.find_spec("torch")
    library = Path(found.origin).parent / "lib" / "libtorch_cpu.so" if found and found.origin else None
    this = ctypes.CDLL(None)
    if library is not None and library.exists() and hasattr(this, "dlopen"):
        this.dlopen.restype = ctypes.c_void_p
        this.dlopen(ctypes.c_char_p(os.fsencode(library)), ctypes.c_int(os.RTLD_NOW))


class Application(FastAPI):
    """FastAPI with `entry` in front of it. FastAPI's own middleware costs each request as much as reading a short body."""

    def __init__(self, **named: Any) -> None:
        """As FastAPI."""
        super().__init__(**named)
        self.entry: ASGIApp = super().__call__

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to `entry`."""
        await self.entry(scope, receive, send)


def create_app(
    store: Store,
    settings: ServiceSettings | None = None,
    *,
    nudge: Callable[[], None] = lambda: None,
    group: Group | None = None,
) -> FastAPI:
    """The application. The catalog must have the schema of this version.

    Args:
        store: where facts are kept; whoever built it closes it.
        settings: of the service.
        nudge: tells workers to look for work; it is called after commits, and must neither raise nor block for long.
        group: this process's place among those behind the same port, if there are several.
    """
    process = _process(store, settings or ServiceSettings(), nudge, group)
    app = Application(
        title="Forwardfill",
        description=_DESCRIPTION,
        version=version("forwardfill"),
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        docs_url=None,  # the page would load its scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=partial(_lifespan, group=group),
    )
    app.state.process = process
    for subject in SUBJECTS:
        app.include_router(subject.router)
    errors.install(app)
    documents.install(app)
    app.entry = telemetry = Telemetry(app.entry, process.metrics.counts)
    app.state.express = Express(process, telemetry.account)
    return app


def _process(store: Store, settings: ServiceSettings, nudge: Callable[[], None], group: Group | None) -> Process:
    searcher, metrics = Searcher.of(store), Metrics(group)
    device = Device(store.settings.index_device, (open_faiss, _open_torch))
    galleries = Galleries(store.catalog, store.files, device.place, group.commits() if group else None)
    lanes = _lanes(store.settings, settings.processes)
    searches = Slots(settings.max_concurrent_searches, settings.max_waiting_searches)
    most = settings.max_concurrent_searches + settings.max_waiting_searches
    return Process(
        store=store,
        galleries=galleries,
        catch_up=CatchUp(galleries),
        searcher=searcher,
        coalescer=Coalescer(searcher, Together(lanes)),
        gatherer=Gatherer(searcher, metrics, searches, most=most, lanes=lanes),
        group_commit=GroupCommit(store, Together(1)),
        keyring=Keyring(store.catalog),
        metrics=metrics,
        settings=settings,
        nudge=nudge,
        searches=searches,
        requests=Slots(settings.max_concurrent_requests, settings.max_waiting_requests),
        uploads=Slots(settings.max_concurrent_requests, settings.max_waiting_requests),
        streams=Slots(settings.max_streams, 0),
        bodies=Room(settings.max_concurrent_requests * settings.max_body_bytes),
    )


def _lanes(settings: GallerySettings, processes: int) -> int:
    """How many searches have cores of their own, each with its threads; more than that are better done together."""
    return max(1, (os.cpu_count() or 1) // processes // settings.threads_used)


@asynccontextmanager
async def _lifespan(app: FastAPI, group: Group | None) -> AsyncIterator[None]:
    process: Process = app.state.process
    settings = process.settings
    # A thread for every slot: else a request that holds a slot might wait for a thread that waits for a slot.
    anyio.to_thread.current_default_thread_limiter().total_tokens = (
        settings.max_concurrent_searches + settings.max_concurrent_requests + _SPARE_THREADS
    )
    refresher = Refresher(
        process.store,
        process.galleries,
        process.keyring,
        process.metrics,
        every_seconds=settings.refresh_seconds,
        warm_up=_import_pytorch,
    )
    await anyio.to_thread.run_sync(refresher.start)
    alive = asyncio.create_task(group.tell_that_it_is_alive()) if group is not None else None
    try:
        yield
    finally:
        process.closing = True
        await anyio.to_thread.run_sync(refresher.stop)
        if alive is not None:
            alive.cancel()
