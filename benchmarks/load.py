"""The load generator: requests whose bytes were made beforehand, over connections that stay open.

It costs as little as it can, because it runs on the cores of what it measures, and it is the same one for every server of a
comparison. One connection is a plain socket; several are one event loop.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from time import perf_counter
from typing import NamedTuple, TypeVar, cast

import numpy as np
import uvloop
from numpy.typing import NDArray

T = TypeVar("T")

_END = b"\r\n\r\n"
_TIMEOUT = 120.0


class Answer(NamedTuple):
    """What came back for one request."""

    #: from the moment at which it was to be sent until the whole answer was there
    seconds: float
    status: int
    body: bytes


class Load(NamedTuple):
    """What a number of requests gave."""

    #: from the first request to the last answer
    seconds: float
    answers: list[Answer]

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.answers) / self.seconds

    @property
    def failed(self) -> int:
        """Answers other than 200."""
        return sum(answer.status != 200 for answer in self.answers)

    def percentile(self, percent: float) -> float:
        """The percentile of the latencies, in milliseconds."""
        return float(np.percentile(self._latencies(), percent)) * 1000

    def checked(self) -> Load:
        """Itself, if every answer was 200: what is refused is fast, and no measure.

        Raises:
            RuntimeError: one was not.
        """
        for answer in self.answers:
            if answer.status != 200:
                raise RuntimeError(f"{self.failed} of {len(self.answers)} requests failed, such as {answer[1:]}")
        return self

    def _latencies(self) -> NDArray[np.float64]:
        return np.array([answer.seconds for answer in self.answers])


def post(path: str, body: bytes) -> bytes:
    """A whole request."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + _END + body


class Connection:
    """One client that waits for each answer: a plain blocking socket, the least that a client can cost."""

    def __init__(self, port: int) -> None:
        """Connect to a server of this machine."""
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: bytes) -> Answer:
        """Send one request and wait for the answer."""
        started = perf_counter()
        self._socket.sendall(request)
        data = self._socket.recv(1 << 16)
        while (whole := parsed(data)) is None:
            more = self._socket.recv(1 << 16)
            if not more:
                raise ConnectionError("the server closed the connection")
            data += more
        return Answer(perf_counter() - started, *whole)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def one_by_one(port: int, requests: Sequence[bytes], count: int) -> Load:
    """One client: the next request goes out when the answer to the one before has come."""
    connection = Connection(port)
    try:
        with _no_collection():
            started = perf_counter()
            answers = [connection.ask(request) for request in islice(cycle(requests), count)]
            return Load(perf_counter() - started, answers)
    finally:
        connection.close()


def together(port: int, requests: Sequence[bytes], *, connections: int, count: int) -> Load:
    """So many clients at once, each of which waits for its answer: what a server can do."""

    async def client(todo: Iterator[bytes], answers: list[Answer]) -> None:
        channel = await _connect(port)
        for request in todo:
            started = perf_counter()
            status, body = await channel.ask(request)
            answers.append(Answer(perf_counter() - started, status, body))
        await channel.close()

    async def all_of_them() -> Load:
        todo, answers = islice(cycle(requests), count), list[Answer]()
        started = perf_counter()
        await asyncio.gather(*(client(todo, answers) for _ in range(connections)))
        return Load(perf_counter() - started, answers)

    return _run(all_of_them())


def paced(
    port: int, requests: Sequence[bytes], *, connections: int, rate: float, while_: Callable[[float], bool]
) -> Load:
    """So many requests a second, whether or not the answers keep up.

    Seconds count from when a request was due, whether or not a connection was free: a server that hangs for a moment is
    charged for all who waited.

    Args:
        port: of the server.
        requests: sent in turn.
        connections: how many can be under way at once.
        rate: requests per second.
        while_: told the seconds since the start, says whether to go on; asked before each request.
    """

    async def client(due: asyncio.Queue[tuple[float, bytes] | None], answers: list[Answer]) -> None:
        channel = await _connect(port)
        while (next_one := await due.get()) is not None:
            at, request = next_one
            status, body = await channel.ask(request)
            answers.append(Answer(perf_counter() - at, status, body))
        await channel.close()

    async def send(due: asyncio.Queue[tuple[float, bytes] | None]) -> None:
        started = perf_counter()
        for number, request in enumerate(cycle(requests)):
            early = started + number / rate - perf_counter()
            if early > 0:
                await asyncio.sleep(early)
            if not while_(perf_counter() - started):
                break
            due.put_nowait((perf_counter(), request))
        for _ in range(connections):
            due.put_nowait(None)

    async def all_of_them() -> Load:
        due, answers = asyncio.Queue[tuple[float, bytes] | None](), list[Answer]()
        started = perf_counter()
        await asyncio.gather(send(due), *(client(due, answers) for _ in range(connections)))
        return Load(perf_counter() - started, answers)

    return _run(all_of_them())


def parsed(data: bytes | bytearray) -> tuple[int, bytes] | None:
    """The status and the body of an answer, None while it is not whole.

    Raises:
        ValueError: it does not say how long it is.
    """
    end = data.find(_END)
    if end < 0:
        return None
    head = bytes(data[:end]).lower()
    at = head.find(b"content-length:")
    if at < 0:
        raise ValueError(f"an answer without a length: {head[:200]!r}")
    length = int(head[at + 15 :].split(b"\r\n", 1)[0])
    body = bytes(data[end + 4 : end + 4 + length])
    return (int(head[9:12]), body) if len(body) == length else None


class _Channel(asyncio.Protocol):
    """A connection of the event loop: one request at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._data = bytearray()
        self._closed = asyncio.get_running_loop().create_future()
        self._waiting: asyncio.Future[tuple[int, bytes]] | None = None

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._waiting

    async def close(self) -> None:
        self._transport.close()
        await self._closed

    def data_received(self, data: bytes) -> None:
        self._data += data
        try:
            whole = parsed(self._data)
        except ValueError as error:
            self._fail(error)
            return
        if whole is not None and self._waiting is not None and not self._waiting.done():
            self._data.clear()
            self._waiting.set_result(whole)

    def connection_lost(self, error: Exception | None) -> None:
        self._closed.set_result(None)
        self._fail(error or ConnectionError("the server closed the connection"))

    def _fail(self, error: Exception) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)


async def _connect(port: int) -> _Channel:
    _, channel = await asyncio.get_running_loop().create_connection(_Channel, "127.0.0.1", port)
    return channel


def _run(work: Coroutine[None, None, T]) -> T:
    with _no_collection(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@contextmanager
def _no_collection() -> Iterator[None]:
    """The collector would walk over a million ids in the middle of somebody's latency."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
