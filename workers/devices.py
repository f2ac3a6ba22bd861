"""Which GPU a worker takes, where several workers share a host: each a GPU of its own, as long as there are enough."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

# A claim is a lock on a file, which the system lets go of with the process, however it ends.
_FOLDER = Path(tempfile.gettempdir())


class Claim:
    """A number below `count` that no other claim in the same folder has; if all are taken, one of them."""

    def __init__(self, count: int, folder: Path = _FOLDER) -> None:
        """Take one, and keep it until the process ends, or `release`."""
        self._handle: int | None = None
        for number in range(count):
            handle = os.open(folder / f"forwardfill-gpu-{os.getuid()}-{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
            else:
                self._handle, self.number = handle, number
                return
        self.number = os.getpid() % count

    def release(self) -> None:
        """Let others have it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def chosen(wanted: str) -> str:
    """The device that a worker computes on: what the settings name, else a GPU, else the CPU."""
    if wanted != "auto":
        return wanted
    import torch  # noqa: PLC0415 - CUDA is asked about in the worker's own process, never when a module is imported

    count = torch.cuda.device_count()
    return f"cuda:{Claim(count).number}" if count else "cpu"
