"""Messages as files in a folder, for one host without a broker: kombu's transport, made safe for several processes.

kombu's own reader can meet a message that is only half written, and then ends the worker. Here a rename makes a message appear
whole, and another rename takes it, so that exactly one reader has it. A message that cannot be read is dropped, and so are the
oldest where many wait: a nudge carries nothing that the catalog does not know, and each holds up a worker that starts late.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any
from uuid import uuid4

from celery.worker import state
from kombu.transport import filesystem
from kombu.utils.json import dumps

_MESSAGE = ".msg"
_TAKEN = ".taken"
# One nudge says as much as a hundred, but there should be one for each of several workers.
MOST_WAITING = 32
_TURN_SECONDS = 0.2


class Channel(filesystem.Channel):  # type: ignore[misc,unused-ignore]
    """Puts and gets by rename."""

    def _put(self, queue: str, payload: Any, **_: Any) -> None:  # type: ignore[override,unused-ignore]
        folder = Path(self.data_folder_out)
        name = f"{queue}.{time.time_ns():020d}.{uuid4().hex}"
        part = folder / f"{name}.part"
        part.write_text(dumps(payload))
        part.rename(folder / f"{name}{_MESSAGE}")
        for path in self._waiting(queue)[:-MOST_WAITING]:
            path.unlink(missing_ok=True)

    def _get(self, queue: str, timeout: float | None = None) -> Any:  # noqa: ARG002 - polled
        for path in self._waiting(queue):
            taken = path.with_suffix(_TAKEN)
            try:
                path.rename(taken)
            except FileNotFoundError:
                continue  # another worker was faster
            text = taken.read_text()
            taken.unlink()
            try:
                return json.loads(text)
            except ValueError:
                continue
        raise Empty

    def _size(self, queue: str) -> int:
        return len(self._waiting(queue))

    def _purge(self, queue: str) -> int:
        waiting = self._waiting(queue)
        for path in waiting:
            path.unlink(missing_ok=True)
        return len(waiting)

    def _waiting(self, queue: str) -> list[Path]:
        """The messages of a queue, oldest first."""
        folder = Path(self.data_folder_in)
        return sorted(folder.glob(f"{queue}.*{_MESSAGE}"))


class Transport(filesystem.Transport):  # type: ignore[misc,unused-ignore]
    """What Celery is given as a broker."""

    Channel = Channel

    def drain_events(self, connection: Any, timeout: float | None = None, **more: Any) -> None:
        """Wait for a message in short turns: Celery asks for two seconds, twice, and would end as late when told to stop."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        while state.should_stop is None and time.monotonic() < until:
            with suppress(TimeoutError):
                super().drain_events(connection, timeout=_TURN_SECONDS, **more)
                return
        raise TimeoutError
