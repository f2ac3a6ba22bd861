"""Large bodies: streamed to a file in the data folder while they are hashed, and removed unless they are kept."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from gallery import errors
from gallery.files import PART
from gallery.transforms import ARTIFACTS
from service.bodies import chunks
from service.process import Process

_WRITTEN_AT_ONCE = 1 << 20  # fewer hops to a thread than one per chunk


@dataclass(frozen=True, slots=True)
class Upload:
    """A body that arrived whole."""

    path: Path
    sha256: str
    size: int


@asynccontextmanager
async def spooled(request: Request, process: Process, limit: int, name: str) -> AsyncIterator[Upload]:
    """Give the body as a file for the length of the block.

    The file is named like an unfinished one, so that the sweep removes it after a crash. There are at most as many of these files
    at once as there are slots for uploads.

    Raises:
        BodyTooLarge: it is larger than `limit`, the setting `name`.
        RequestTimeout, UnsupportedMediaType: as `bodies.chunks`.
        Overloaded: too many wait to send one.
    """
    files = process.store.files
    hashed, size, waiting = hashlib.sha256(), 0, bytearray()
    async with process.uploads.taken():
        path = files.path(files.new(ARTIFACTS, PART))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("xb") as handle:

                def flush() -> None:
                    hashed.update(waiting)
                    handle.write(waiting)
                    waiting.clear()

                async for chunk in chunks(request, process, limit, name):
                    size += len(chunk)
                    waiting += chunk
                    if len(waiting) >= _WRITTEN_AT_ONCE:
                        await run_in_threadpool(flush)
                await run_in_threadpool(flush)
            yield Upload(path, hashed.hexdigest(), size)
        finally:
            path.unlink(missing_ok=True)


def judged(path: Path) -> dict[str, Any]:
    """The architecture that a file declares, with what the catalog looks for.

    Raises:
        UnsafeArtifact: it is not a well-formed artifact.
    """
    from models import artifacts  # noqa: PLC0415 - it imports PyTorch, see `service.app`

    try:
        return artifacts.check(path).declared()
    except artifacts.UnsafeArtifact as error:
        raise errors.UnsafeArtifact(str(error)) from error
