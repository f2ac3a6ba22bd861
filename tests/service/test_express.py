"""A brief search takes a short way to the answer that it would have had by the long one."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gallery.search.mapped import MappedColumns
from service.gather import Gatherer
from service.keys import create_key
from tests.acceptance.system import wait_for
from tests.service.world import GALLERY, World, opened

SEARCH = f"/galleries/{GALLERY}/search"


@pytest.fixture
def gathered(world: World, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models of the searches that took the short way."""
    taken: list[str] = []
    search = Gatherer.search

    def recorded(self: Gatherer, seen: Any, gallery: str, request: Any, reads: int) -> Any:
        taken.append(request.model)
        return search(self, seen, gallery, request, reads)

    monkeypatch.setattr(Gatherer, "search", recorded)
    return taken


def by_both(world: World, body: bytes, headers: dict[str, str] | None = None) -> tuple[httpx.Response, httpx.Response]:
    """The answers by the short way, and by the long one: of a body whose length is not said."""

    def in_pieces() -> Iterator[bytes]:
        yield body

    given = {"content-type": "application/json", "x-request-id": "mine", **(headers or {})}
    short = world.client.post(SEARCH, content=body, headers=given)
    return short, world.client.post(SEARCH, content=in_pieces(), headers=given)


def told(response: httpx.Response) -> Any:
    """What an answer says, but for how long it took."""
    answer = response.json()
    answer.pop("took_ms", None)
    return response.status_code, response.headers["content-type"], response.headers["x-request-id"], answer


@pytest.mark.parametrize(
    "body",
    [
        {"model": "old", "vector": [0, 1, 0, 0]},
        {"model": "old", "vector": "AACAPwAAAAAAAAAAAAAAAA==", "k": 2},
        {"model": "old", "vector": [0, 1, 0, 0], "companions": {"new": [0, 0, 1, 0, 0]}, "allow_partial": True},
        {"model": "old", "vector": [0, 1, 0, 0], "k": 100, "oversample": 2},
    ],
)
def test_the_answer_is_the_same_by_both_ways(world: World, gathered: list[str], body: Any) -> None:
    short, long = by_both(world, json.dumps(body).encode())
    assert told(short) == told(long)
    assert short.status_code == 200
    assert gathered == ["old"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"model": "old"}',
        b'{"model": "none", "vector": [1, 0, 0, 0]}',
        b'{"model": "old", "vector": [1, 0]}',
        b'{"model": "old", "vector": [1, 0, 0, NaN]}',
        b'{"model": "old", "vector": [1, 0, 0, 1e300]}',
        b'{"model": "old", "vector": "no base64"}',
        b'{"model": "old", "vector": [1, 0, 0, 0], "k": 0}',
        b'{"model": "old", "vector": [1, 0, 0, 0], "k": 100000}',
        b'{"model": "old", "vector": [1, 0, 0, 0], "kk": 1}',
        b'{"model": "old", "vector": [1, 0, 0, 0], "companions": {"new": [1]}}',
        b'{"model": "old", "vector": [1, 0, 0, 0], "companions": {"none": [1]}}',
        b'{"model": "new", "vector": [1, 0, 0, 0, 0]}',
    ],
)
def test_a_refusal_is_the_same_by_both_ways(world: World, body: bytes) -> None:
    short, long = by_both(world, body)
    assert told(short) == told(long)
    assert short.status_code >= 400


@pytest.mark.parametrize(
    "headers",
    [
        {"content-encoding": "gzip"},
        {"content-type": "text/plain"},
        {"content-type": "application/jsonl"},
        {"content-type": "application/json-patch+json"},
        {"origin": "https://elsewhere.example"},
        {"origin": "http://["},
        {"origin": "null"},
    ],
)
def test_what_is_not_plain_is_refused_by_both_ways(world: World, headers: dict[str, str]) -> None:
    short, long = by_both(world, b'{"model": "old", "vector": [1, 0, 0, 0]}', headers)
    assert told(short) == told(long)
    assert short.status_code in (403, 415)


def test_a_key_is_asked_for_on_the_short_way_too(world: World, gathered: list[str]) -> None:
    secret = create_key(world.store.catalog, "searcher", "search")
    world.app.state.process.keyring.refresh()
    body = b'{"model": "old", "vector": [0, 1, 0, 0]}'
    for headers, status in (
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": f"bearer {secret}"}, 200),
    ):
        short, long = by_both(world, body, headers)
        assert told(short) == told(long)
        assert short.status_code == status
    assert gathered == ["old"]


@pytest.mark.parametrize(
    "more", [{"filter": {"axis": 1}}, {"include": ["payload"]}, {"k": 101}], ids=["filter", "payload", "hits"]
)
def test_a_search_that_is_not_brief_takes_the_long_way(world: World, gathered: list[str], more: Any) -> None:
    body = json.dumps({"model": "old", "vector": [0, 1, 0, 0], **more}).encode()
    short, long = by_both(world, body)
    assert told(short) == told(long)
    assert short.status_code == 200
    assert gathered == []


def test_a_search_with_much_to_transform_goes_on_in_a_thread_and_is_answered_and_counted_once(
    world: World, gathered: list[str], count: Callable[[str], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.gather.MOST_WEIGHTS", 0)
    transforming: list[str] = []
    take = MappedColumns.take

    def recorded(*given: Any, **named: Any) -> Any:
        found = take(*given, **named)
        transforming.append(threading.current_thread().name)
        return found

    monkeypatch.setattr(MappedColumns, "take", recorded)
    body = {"model": "new", "vector": [0, 1, 0, 0, 0], "companions": {"old": [0, 1, 0, 0]}}
    short, long = by_both(world, json.dumps(body).encode())
    assert told(short) == told(long)
    assert (short.status_code, short.json()["served"]["routes"]["forward"]) == (200, 4)
    assert gathered == ["new"]
    assert len(transforming) == 2
    assert all("worker" in name.lower() for name in transforming), transforming
    assert count('forwardfill_searches_total{outcome="answered"}') == 2


def test_both_ways_are_counted_as_one_route_and_each_search_once(world: World, count: Callable[[str], float]) -> None:
    name = 'forwardfill_http_requests_total{method="POST",route="/galleries/{gallery}/search",status="200"}'
    by_both(world, b'{"model": "old", "vector": [0, 1, 0, 0]}')
    assert count(name) == 2
    assert count('forwardfill_searches_total{outcome="answered"}') == 2
    assert count("forwardfill_search_seconds_count") == 2


def test_a_body_is_no_larger_than_the_setting_by_either_way(tmp_path: Path) -> None:
    with opened(tmp_path, max_body_bytes=1000) as world:
        world.prepared().filled()
        short, long = by_both(world, b'{"model": "old", "vector": [0, 1, 0, 0]' + b" " * 1000 + b"}")
        assert told(short) == told(long)
        assert short.status_code == 413


def test_a_key_is_asked_for_before_the_body_is_waited_for(world: World) -> None:
    create_key(world.store.catalog, "searcher", "search")
    world.app.state.process.keyring.refresh()
    address = world.client.base_url
    with socket.create_connection((address.host, address.port or 80), timeout=10) as connection:
        connection.sendall(f"POST {SEARCH} HTTP/1.1\r\nHost: {address.host}\r\nContent-Length: 60000\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_a_client_that_hangs_up_is_no_error_of_the_service(world: World, count: Callable[[str], float]) -> None:
    address, items = world.client.base_url, f"/galleries/{GALLERY}/items"
    with socket.create_connection((address.host, address.port or 80), timeout=10) as connection:
        connection.sendall(f"POST {items} HTTP/1.1\r\nHost: {address.host}\r\nContent-Length: 60000\r\n\r\n{{".encode())
    name = 'forwardfill_http_requests_total{method="POST",route="/galleries/{gallery}/items",status="%d"}'
    wait_for(lambda: count(name % 499) == 1, 10, lambda: "it was not counted")
    assert count(name % 500) == 0


def test_a_crash_is_counted_alike_by_both_ways(
    world: World, monkeypatch: pytest.MonkeyPatch, count: Callable[[str], float]
) -> None:
    def crash(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(type(world.app.state.process.searcher), "search", crash)
    short, long = by_both(world, b'{"model": "old", "vector": [0, 1, 0, 0]}')
    assert told(short) == told(long)
    assert short.status_code == 500
    assert count('forwardfill_searches_total{outcome="failed"}') == 2
    name = 'forwardfill_http_requests_total{method="POST",route="/galleries/{gallery}/search",status="500"}'
    assert count(name) == 2


@pytest.fixture
def count(world: World) -> Callable[[str], float]:
    def value(name: str) -> float:
        lines = world.client.get("/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), 0.0)

    return value
