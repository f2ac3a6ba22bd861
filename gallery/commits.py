"""A counter for each of several processes, in memory that they share: how often it told a client of something new.

Processes that answer behind one port look like one to a client: it expects that its next search sees what it has just
written, whichever of them that reaches. A search must not ask the catalog, but it can compare a few bytes.
"""

from __future__ import annotations

import mmap
from pathlib import Path

_BYTES = 8


class Commits:
    """The counters. Only its own process raises one, so no lock is needed."""

    def __init__(self, file: Path, place: int) -> None:
        """Share a file that `make` made; `place` is this process's among the others, from 0."""
        with file.open("r+b") as opened:
            self._shared = mmap.mmap(opened.fileno(), 0)
        self._mine = slice(place * _BYTES, (place + 1) * _BYTES)

    @staticmethod
    def make(file: Path, processes: int) -> None:
        """Make the file for so many processes, all numbers 0."""
        file.write_bytes(bytes(_BYTES * processes))

    def announce(self) -> None:
        """Say that there is something new, before a client is told of it. One thread at a time."""
        number = int.from_bytes(self._shared[self._mine], "little") + 1
        self._shared[self._mine] = number.to_bytes(_BYTES, "little")

    def of_others(self) -> bytes:
        """What the other processes have announced. It differs from what it was if any of them announced something since."""
        return self._shared[: self._mine.start] + self._shared[self._mine.stop :]
