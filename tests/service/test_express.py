"""A brief search takes a short way to the answer that it would have had by the long one."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import PropertyMock

import httpx
import pytest

from gallery.search.mapped import MappedColumns
from service.errors import Unavailable
from service.express import Brief
from service.gather import Gatherer
from service.keys import create_key
from service.protocol import Protocol
from tests.acceptance.system import wait_for
from tests.service.world import GALLERY, UNITS, World, opened

SEARCH = f"/galleries/{GALLERY}/search"


@pytest.fixture
def gathered(world: World, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models of the searches that took the short way."""
    taken: list[str] = []
    ask = Gatherer.ask

    def recorded(self: Gatherer, seen: Any, gallery: str, request: Any, reads: int, asker: Any) -> None:
        taken.append(request.model)
        ask(self, seen, gallery, request, reads, asker)

    monkeypatch.setattr(Gatherer, "ask", recorded)
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
        {"x-forwarded-for": "203.0.113.9"},
    ],
)
def test_what_is_not_plain_is_refused_by_both_ways(world: World, headers: dict[str, str]) -> None:
    short, long = by_both(world, b'{"model": "old", "vector": [1, 0, 0, 0]}', headers)
    assert told(short) == told(long)
    assert short.status_code in (403, 415)


@pytest.mark.parametrize("path", [f"/galleries/{GALLERY}/sought", f"/collections/{GALLERY}/search", f"{SEARCH}/search"])
def test_a_search_that_is_sent_elsewhere_finds_nothing_there(world: World, path: str) -> None:
    world.post(path, {"model": "old", "vector": [0, 1, 0, 0]}, status=404)


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


def whole(body: bytes, *headers: bytes) -> bytes:
    """A search as bytes."""
    head = (f"POST {SEARCH} HTTP/1.1".encode(), b"Host: 127.0.0.1", b"Content-Length: %d" % len(body), *headers)
    return b"\r\n".join((*head, b"", body))


@contextmanager
def connected(world: World) -> Iterator[tuple[socket.socket, BinaryIO]]:
    """A connection, and what is read from it."""
    address = world.client.base_url
    with (
        socket.create_connection((address.host, address.port or 80), timeout=20) as connection,
        connection.makefile("rb") as stream,
    ):
        yield connection, stream


def read(stream: BinaryIO) -> tuple[bytes, dict[bytes, bytes], Any]:
    """The next answer: its status line, headers, and what it says."""
    status, headers = stream.readline().rstrip(), dict[bytes, bytes]()
    while line := stream.readline().rstrip():
        name, _, value = line.partition(b": ")
        headers[name.lower()] = value
    return status, headers, json.loads(stream.read(int(headers[b"content-length"])))


def axis(at: int, model: str = "old", **more: Any) -> bytes:
    return json.dumps({"model": model, "vector": UNITS[at].tolist(), "k": 1, **more}).encode()


@pytest.mark.parametrize("more", [b"Connection: keep-alive", b"Connection: close"])
def test_both_ways_write_the_same_head(world: World, gathered: list[str], more: bytes) -> None:
    heads = []
    for body in (axis(1), axis(1, filter={})):
        with connected(world) as (connection, stream):
            connection.sendall(whole(body, b"X-Request-Id: mine", more))
            status, headers, _ = read(stream)
            heads.append(
                (status, [name for name in headers if name != b"date"], headers[b"x-request-id"], b"date" in headers)
            )
    assert heads[0] == heads[1]
    assert gathered == ["old"]


def test_searches_sent_without_waiting_are_answered_in_their_order_whichever_way_they_take(
    world: World, gathered: list[str]
) -> None:
    sent = [axis(0), axis(1), axis(2, include=["payload"]), axis(3), axis(0, model="none"), axis(1)]
    with connected(world) as (connection, stream):
        connection.sendall(b"".join(map(whole, sent)))
        answers = [read(stream) for _ in sent]
    found = [said["hits"][0]["id"] if "hits" in said else said["code"] for _, _, said in answers]
    assert found == ["item-0", "item-1", "item-2", "item-3", "model_not_found", "item-1"]
    assert len(gathered) == 4


def test_a_body_may_come_after_its_head_and_in_pieces(world: World, gathered: list[str]) -> None:
    head, _, body = whole(axis(2)).partition(b"\r\n\r\n")
    with connected(world) as (connection, stream):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (head + b"\r\n\r\n", body[:10], body[10:]):
            connection.sendall(piece)
        assert read(stream)[2]["hits"][0]["id"] == "item-2"
    assert gathered == ["old"]


def test_how_long_a_body_takes_to_come_is_no_time_of_the_search(
    world: World, gathered: list[str], monkeypatch: pytest.MonkeyPatch, count: Callable[[str], float]
) -> None:
    monkeypatch.setattr("service.protocol._BODY_SECONDS", 20.0)
    head, _, body = whole(axis(2)).partition(b"\r\n\r\n")
    with connected(world) as (connection, stream):
        connection.sendall(head + b"\r\n\r\n")
        time.sleep(1)
        connection.sendall(body)
        assert read(stream)[2]["took_ms"] < 1000
    assert gathered == ["old"]
    assert count("forwardfill_search_seconds_sum") < 1


def test_a_body_that_is_long_in_coming_is_waited_for_by_the_long_way(
    world: World, gathered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.protocol._BODY_SECONDS", 0.0)
    handed_on, hand_on = threading.Event(), Brief.hand_on
    monkeypatch.setattr(Brief, "hand_on", lambda brief: (hand_on(brief), handed_on.set()))
    search = whole(axis(2))
    with connected(world) as (connection, stream):
        for _ in range(2):
            handed_on.clear()
            connection.sendall(search[:-5])
            assert handed_on.wait(10)
            connection.sendall(search[-5:])
            assert read(stream)[2]["hits"][0]["id"] == "item-2"
    assert gathered == []


def test_a_body_that_is_long_in_coming_behind_another_search_is_waited_for_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.protocol._BODY_SECONDS", 0.0)
    search = whole(axis(2))
    with connected(world) as (connection, stream):
        connection.sendall(search + search[:-5])
        assert read(stream)[2]["hits"][0]["id"] == "item-2"
        connection.sendall(search[-5:])
        assert read(stream)[2]["hits"][0]["id"] == "item-2"


def test_a_client_that_wants_no_more_is_answered_and_the_connection_closed(world: World, gathered: list[str]) -> None:
    with connected(world) as (connection, stream):
        connection.sendall(whole(axis(1), b"Connection: close"))
        _, headers, said = read(stream)
        assert (headers[b"connection"], said["hits"][0]["id"]) == (b"close", "item-1")
        assert stream.read() == b""
    assert gathered == ["old"]


def test_a_client_that_hangs_up_before_its_body_is_counted_as_gone(world: World, count: Callable[[str], float]) -> None:
    with connected(world) as (connection, _):
        connection.sendall(whole(axis(1))[:-5])
    name = 'forwardfill_http_requests_total{method="POST",route="/galleries/{gallery}/search",status="499"}'
    wait_for(lambda: count(name) == 1, 10, lambda: "it was not counted")


def test_a_client_that_hangs_up_before_its_answer_harms_nobody(
    world: World, gathered: list[str], count: Callable[[str], float]
) -> None:
    for _ in range(20):
        with connected(world) as (connection, _):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed, it is reset
            connection.sendall(whole(axis(1)))
    wait_for(lambda: len(gathered) >= 1, 10, lambda: "none was read")
    assert world.old_search(1)["hits"][0]["id"] == "item-1"
    assert count('forwardfill_searches_total{outcome="failed"}') == 0


def test_a_client_that_hangs_up_with_several_requests_under_way_is_no_error_of_the_service(
    world: World, monkeypatch: pytest.MonkeyPatch, count: Callable[[str], float], caplog: pytest.LogCaptureFixture
) -> None:
    searcher = type(world.app.state.process.searcher)
    search, searching, gone = searcher.search, threading.Event(), threading.Event()
    lose, lost = Protocol.connection_lost, threading.Event()

    def waiting(*given: Any, **named: Any) -> Any:
        searching.set()
        assert gone.wait(10)
        return search(*given, **named)

    monkeypatch.setattr(searcher, "search", waiting)
    monkeypatch.setattr(Protocol, "connection_lost", lambda *given: (lose(*given), lost.set()))
    caplog.set_level("ERROR")
    with connected(world) as (connection, _):
        connection.sendall(whole(axis(1, filter={})) + whole(axis(2, filter={})))
        assert searching.wait(10)
    assert lost.wait(10)
    gone.set()
    name = 'forwardfill_http_requests_total{method="POST",route="/galleries/{gallery}/search",status="200"}'
    wait_for(lambda: count(name) == 1, 10, lambda: "it was not answered")
    assert caplog.records == []


def test_a_refusal_where_the_application_can_no_longer_be_run_is_as_every_refusal_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: Any) -> None:
        given[-1].refuse(Unavailable(""))

    monkeypatch.setattr(Gatherer, "ask", stopped)
    refused = world.client.post(SEARCH, content=axis(1))
    world.refused(refused, 503, "unavailable")
    assert refused.headers["retry-after"] == "1"


def test_where_the_process_lags_behind_another_a_search_waits_for_it(
    world: World, gathered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = world.app.state.process
    behind = PropertyMock(side_effect=[7, None, None, None])
    monkeypatch.setattr(type(process.galleries), "behind", behind)
    with connected(world) as (connection, stream):
        connection.sendall(whole(axis(3)))
        assert read(stream)[2]["hits"][0]["id"] == "item-3"
    assert gathered == ["old"]


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
