"""One of several processes that answer behind one port: what it shares with the others, and how it listens beside them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gallery.commits import Commits


@dataclass(frozen=True, slots=True)
class Group:
    """Where a process stands in a group.

    The folder belongs to whoever starts the group, outlives each of its processes, and is gone with the last.
    """

    folder: Path
    #: of this process, from 0; one that is started in place of another has its number
    place: int

    @classmethod
    def made(cls, folder: Path, processes: int) -> list[Group]:
        """A group of so many, in an empty folder."""
        Commits.make(folder / _COMMITS, processes)
        return [cls(folder, place) for place in range(processes)]

    def commits(self) -> Commits:
        """Through which they tell each other of writes."""
        return Commits(self.folder / _COMMITS, self.place)

    @property
    def own_counts(self) -> Path:
        """File of what this process has counted, and those that had its place before."""
        return self.folder / f"{self.place}{_COUNTS}"

    def other_counts(self) -> Iterator[Path]:
        """The files of the others, as far as they have counted anything."""
        return (file for file in self.folder.glob(f"*{_COUNTS}") if file != self.own_counts)


_COMMITS, _COUNTS = "commits", ".counts.json"


def shared_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound beside those of the other processes: the kernel gives each connection to one that listens.

    Raises:
        OSError: something else has the port.
    """
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        made.bind((host, port))
    except OSError:
        made.close()
        raise
    made.set_inheritable(False)
    return made


def reserved(host: str, port: int) -> socket.socket:
    """Hold a port for a group: bound and not listening, so that no connection comes here; port 0 takes a free one.

    Raises:
        OSError: somebody else has it. Another group would share it, so it is asked for alone first.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind((host, port))
        taken: int = alone.getsockname()[1]
    return shared_socket(host, taken)
