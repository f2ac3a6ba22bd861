"""One of several processes that answer behind one port: what it shares with the others, and how it listens beside them."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gallery.commits import Commits


@dataclass(frozen=True, slots=True)
class Group:
    """Where a process stands in a group.

    The folder belongs to whoever starts the group, who removes it at the end.
    """

    folder: Path
    #: of this process, from 0; one that is started in place of another has its number
    place: int
    #: the end for writing of a pipe, by which whoever started this process hears that it is alive; None where nobody listens
    alive: int | None = None

    @classmethod
    def made(cls, folder: Path, processes: int) -> list[Group]:
        """The members of a group of `processes`, in an empty folder."""
        Commits.make(folder / _COMMITS, processes)
        return [cls(folder, place) for place in range(processes)]

    def commits(self) -> Commits:
        """The file through which the processes tell each other of writes."""
        return Commits(self.folder / _COMMITS, self.place)

    @property
    def own_counts(self) -> Path:
        """The file of what this process, and those that had its place before, have counted."""
        return self.folder / f"{self.place}{_COUNTS}"

    def all_counts(self) -> Sequence[Path]:
        """The files of all processes that have counted anything, always in the same order."""
        return sorted(self.folder.glob(f"*{_COUNTS}"))

    async def tell_that_it_is_alive(self) -> None:
        """Write a byte each second that the event loop goes round: what is stopped, or hangs in a handler, writes none."""
        while self.alive is not None:
            with suppress(OSError):  # nobody reads: he is stopped himself, or gone
                os.write(self.alive, b".")
            await asyncio.sleep(_ALIVE_SECONDS)


_ALIVE_SECONDS = 1.0
_COMMITS, _COUNTS = "commits", ".counts.json"


class PortTakenError(Exception):
    """Something else listens at the address, or it is none of this host's."""


def own_sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to an address that nobody else has. They do not listen yet, so that no client waits for an answer.

    Raises:
        PortTakenError: somebody has the address.
    """
    try:
        return _bound(host, port, socket.SO_REUSEADDR)
    except OSError as error:
        raise _taken(host, port, error) from error


def shared_sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets bound beside those of the other processes; the kernel gives each connection to one that listens.

    Raises:
        OSError: no address of the host can be bound.
    """
    return _bound(host, port, socket.SO_REUSEADDR, socket.SO_REUSEPORT)


@contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """Hold a port for a group while the block runs, and give it; 0 takes a free one.

    The sockets that hold it are bound and do not listen, so that no connection comes here. First the port is bound without
    sharing, which fails if another group has it. Then it is bound for sharing, with SO_REUSEADDR off: while nobody listens
    yet, the kernel would otherwise let another process bind it without sharing.

    Raises:
        PortTakenError: somebody else has it.
    """
    alone = own_sockets(host, port)
    taken: int = alone[0].getsockname()[1]
    for each in alone:
        each.close()
    try:
        held = shared_sockets(host, taken)
    except OSError as error:
        raise _taken(host, port, error) from error
    try:
        for each in held:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        yield taken
    finally:
        for each in held:
            each.close()


def _taken(host: str, port: int, error: OSError) -> PortTakenError:
    return PortTakenError(f"cannot listen on {host}:{port}: {error.strerror}")


def _bound(host: str, port: int, *options: int) -> list[socket.socket]:
    """A socket for each address that a host name has, as asyncio makes them; without those that this host lacks.

    For port 0, all have the one that the first was given.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    lacks: OSError | None = None
    with ExitStack() as opened:
        bound = list[socket.socket]()
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            try:
                made = opened.enter_context(_bound_to(family, (address[0], port, *address[2:]), options))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                lacks = error
            else:
                port = made.getsockname()[1]
                bound.append(made)
        if not bound and lacks is not None:
            raise lacks
        opened.pop_all()  # they stay open
        return bound


def _bound_to(family: int, address: tuple[Any, ...], options: Sequence[int]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        for option in options:
            made.setsockopt(socket.SOL_SOCKET, option, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made
