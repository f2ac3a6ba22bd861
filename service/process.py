"""What the handlers of an API process share, built once by the composition root."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from sqlalchemy.exc import IntegrityError

from gallery.arrays import Vectors
from gallery.errors import NotFound
from gallery.group_commit import GroupCommit
from gallery.search.coalesce import Coalescer
from gallery.search.run import Searcher
from gallery.snapshot import Galleries, World
from gallery.store import Store
from service.catch_up import CatchUp
from service.gather import Gatherer
from service.keys import Keyring
from service.looks import Looks
from service.metrics import Metrics
from service.settings import ServiceSettings
from service.slots import Room, Slots

T = TypeVar("T")
_LOOK_AGAIN_SECONDS = 0.05


@dataclass(slots=True)
class Process:
    """One per application."""

    store: Store
    galleries: Galleries
    catch_up: CatchUp
    searcher: Searcher
    #: does the searches of many clients by one call, in threads
    coalescer: Coalescer
    #: does brief searches of many clients by one call, on the event loop
    gatherer: Gatherer
    #: writes and deletes the items of many clients by one commit
    group_commit: GroupCommit
    keyring: Keyring
    metrics: Metrics
    settings: ServiceSettings
    nudge: Callable[[], None]
    searches: Slots
    requests: Slots
    #: for requests that send a file; not `requests`, so that slow senders hold up nothing but other files
    uploads: Slots
    #: for answers that go on for as long as an upgrade
    streams: Slots
    #: the memory for the large bodies of all requests
    bodies: Room
    #: large bodies are parsed by few at a time: a parsed one may take twenty times its bytes, and the interpreter's lock lets
    #: only one of them go on anyway
    parsing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    #: the latest look at each upgrade that clients follow
    looks: Looks[Any] = field(default_factory=Looks)
    #: by column, how certain each row is, of the upgrade whose refinement was asked for last
    predicted: dict[int, Vectors] = field(default_factory=dict)
    #: the process is asked to stop, so streams end. No event: a signal may come while the handler of one before it sets that.
    closing: bool = False
    _looked: float = 0.0

    def seen(self, read: Callable[[World], T]) -> T:
        """Read from what is in memory; where something is missing, look once whether another process has just added it.

        A client that asks for what does not exist must not make every search read the catalog, so this is done at most
        every 50 ms.
        """
        try:
            return read(self.catch_up.world())
        except NotFound:
            if time.monotonic() - self._looked < _LOOK_AGAIN_SECONDS:
                raise
            self._looked = time.monotonic()
            return read(self.catch_up.once_more())

    def written(self, *, nudge: bool = False) -> World:
        """To be called after a commit: the next search sees what was written; `nudge` tells workers that there is work."""
        world = self.galleries.announced()
        if nudge:
            self.nudge()
        return world


async def of(request: Request) -> Process:
    """The process of a request. Not a plain function: FastAPI would hand each request to a thread and back for it."""
    process: Process = request.app.state.process
    return process


ProcessDep = Annotated[Process, Depends(of)]


async def _search_slot(process: ProcessDep) -> AsyncIterator[None]:
    async with process.searches.taken():
        yield


async def _request_slot(process: ProcessDep) -> AsyncIterator[None]:
    async with process.requests.taken():
        yield


async def _stream_slot(process: ProcessDep) -> AsyncIterator[None]:
    async with process.streams.taken():
        yield


#: given back when the client has gone
StreamSlot = Annotated[None, Depends(_stream_slot, scope="request")]
# Given back when the handler is done, and not only when a slow client has read the answer. It must be the last of a handler's
# parameters, so that it is taken once the body is there: else a few slow senders would hold all slots.
SearchSlot = Annotated[None, Depends(_search_slot, scope="function")]
RequestSlot = Annotated[None, Depends(_request_slot, scope="function")]


def once_more(act: Callable[[], T]) -> T:
    """Call `act`, and once more if another process inserted the same row meanwhile: now `act` sees that row, and judges it."""
    try:
        return act()
    except IntegrityError:
        return act()
