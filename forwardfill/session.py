"""A connection to one service: a request goes out, and what comes back is plain JSON or a `ForwardfillError`."""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import httpx

from forwardfill import wire
from forwardfill.answers import Json
from forwardfill.errors import ForwardfillError, answered, problem, stranger

EVENTS = "text/event-stream"
#: None: there are as many connections as threads ask at once, and each is closed once it was idle for httpx's usual time. To keep
#: to a number, httpcore 1.0 closes connections that another thread was just given: its request fails, or waits in vain.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


class Session:
    """Safe to use from several threads, and in processes that are forked from the one that made it."""

    def __init__(
        self, base_url: str, api_key: str | None, timeout: httpx.Timeout | float, transport: httpx.BaseTransport | None
    ) -> None:
        """Connect at the first request, not now; the arguments are those of `Client`.

        Raises:
            ValueError: the key cannot be one.
        """
        headers = {"accept": "application/json"}
        if api_key is not None:
            if not wire.fits_a_header(api_key):
                raise ValueError("api_key: is empty, or has spaces, a line's end or signs that no key has")
            headers["authorization"] = f"Bearer {api_key}"

        def connections() -> httpx.Client:
            way = transport or _straight_way(base_url)
            return httpx.Client(base_url=base_url, headers=headers, timeout=timeout, transport=way, limits=LIMITS)

        self._connections, self._made, self._process = connections, connections(), os.getpid()
        self._limits: dict[str, int] | None = None

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        at_most: float = math.inf,
    ) -> Json:
        """Send a request with a JSON body, or with none, and return the answer; `at_most` is as for `request`."""
        if body is None:
            return self.request(method, path, query=query, headers=headers, at_most=at_most)
        sent = {**(headers or {}), "content-type": "application/json"}
        return self.request(method, path, content=wire.as_json(body), query=query, headers=sent, at_most=at_most)

    def request(
        self,
        method: str,
        path: str,
        *,
        content: bytes | Iterable[bytes] | None = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        at_most: float = math.inf,
    ) -> Json:
        """Send a request with any body, and return the answer; no timeout is longer than `at_most` seconds."""
        http = self._http
        timeout = httpx.Timeout(**{name: _shorter(usual, at_most) for name, usual in http.timeout.as_dict().items()})
        return answered(http.request(method, path, content=content, params=query, headers=headers, timeout=timeout))

    def pages(self, path: str, **only: str | None) -> Iterator[Json]:
        """All entries of a list, page by page; an answer has them under the list's own name."""
        query = {"page_size": "1000", **{name: value for name, value in only.items() if value is not None}}
        while True:
            page = self.call("GET", path, query=query)
            yield from page[path.rpartition("/")[2]]
            if not page.get("next_page_token"):
                return
            query["page_token"] = page["next_page_token"]

    def parts(self, path: str, count: int, size: int, body: Callable[[slice], Json]) -> Iterator[Json]:
        """Send `count` rows, `size` in a request, or half as many once the answer is that the request is too large."""
        start = 0
        while start < count:
            part = slice(start, min(start + size, count))
            try:
                yield self.call("POST", path, body(part))
            except ForwardfillError as error:
                if error.status != httpx.codes.REQUEST_ENTITY_TOO_LARGE or part.stop - start == 1:
                    raise
                size = (part.stop - start) // 2
            else:
                start = part.stop

    @contextmanager
    def event_stream(self, path: str, after: str | None, timeout: httpx.Timeout) -> Iterator[Iterator[str]]:
        """The lines of a stream of events, from the one behind the id `after` on."""
        headers = {"accept": EVENTS} | ({} if after is None else {"last-event-id": after})
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if not response.is_success:
                response.read()
                raise problem(response)
            if not response.headers.get("content-type", EVENTS).startswith(EVENTS):
                raise stranger(response)
            yield wire.lines(response.iter_bytes())

    def limit(self, name: str) -> int:
        """One of the service's published limits, asked for once."""
        if self._limits is None:
            self._limits = self.call("GET", "/info")["limits"]
        return self._limits[name]

    @property
    def _http(self) -> httpx.Client:
        """Connections of this process only: two processes that share one would read each other's answers."""
        if self._process != os.getpid() and not self._made.is_closed:
            self._made, self._process = self._connections(), os.getpid()
        return self._made


def _shorter(timeout: float | None, at_most: float) -> float | None:
    """The shorter of two timeouts, None if neither ends."""
    shorter = at_most if timeout is None else min(timeout, at_most)
    return None if shorter == math.inf else shorter


def _straight_way(base_url: str) -> httpx.HTTPTransport | None:
    """A transport that ignores proxies, for a service on this machine; None if it is elsewhere."""
    host = httpx.URL(base_url).host
    try:
        here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        here = False
    return httpx.HTTPTransport(limits=LIMITS) if here else None
