"""How HTTP is read: a request's head has a limit, whoever sends it, and however it comes in pieces."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice

import pytest

from service.protocol import MOST_BYTES
from tests.service.world import GALLERY, UNITS, World, opened

PATIENCE_SECONDS = 20.0
PIECE = 1 << 13


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with opened(tmp_path_factory.mktemp("shared")) as world:
        yield world.prepared().filled()


def request(world: World, line: str, *headers: bytes, body: bytes = b"") -> bytes:
    """A whole request."""
    host = f"Host: {world.client.base_url.host}:{world.client.base_url.port}".encode()
    return b"\r\n".join((f"{line} HTTP/1.1".encode(), host, b"Content-Length: %d" % len(body), *headers, b"", body))


def talk(world: World, sent: Sequence[bytes], expected: int = 1) -> list[tuple[int, bytes]]:
    """Send on one connection, piece by piece; so many answers, or those until the service closes it."""
    url = world.client.base_url
    with closing(socket.create_connection((url.host, url.port or 80), timeout=PATIENCE_SECONDS)) as connection:
        for piece in sent:
            connection.sendall(piece)
        return list(islice(answers(connection), expected))


def answers(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Statuses and bodies."""
    with connection.makefile("rb") as stream:
        while line := stream.readline():
            length = 0
            while (header := stream.readline()) not in (b"\r\n", b""):
                if header.lower().startswith(b"content-length:"):
                    length = int(header.partition(b":")[2])
            yield int(line.split()[1]), stream.read(length)


def long_header(size: int) -> bytes:
    return b"X-Long: " + b"a" * size


def in_pieces(whole: bytes) -> list[bytes]:
    return [whole[at : at + PIECE] for at in range(0, len(whole), PIECE)]


@pytest.mark.parametrize(
    "headers",
    [[long_header(MOST_BYTES)], [b"X-%d: b" % n for n in range(MOST_BYTES // 5)], [long_header(3 * MOST_BYTES)]],
    ids=["one", "many", "in one piece"],
)
@pytest.mark.parametrize("cut", [in_pieces, lambda whole: [whole]], ids=["pieces", "whole"])
def test_a_head_that_is_too_large_is_refused_and_the_connection_closed(
    shared: World, headers: list[bytes], cut: Callable[[bytes], list[bytes]]
) -> None:
    ((status, body),) = talk(shared, cut(request(shared, "GET /health/live", *headers)))
    assert (status, json.loads(body)["code"]) == (431, "headers_too_large")


def test_a_head_without_an_end_is_refused_before_it_ends(shared: World) -> None:
    head = request(shared, "GET /health/live", long_header(8 * MOST_BYTES))[:-4]
    ((status, _),) = talk(shared, in_pieces(head))
    assert status == 431


def test_a_path_that_is_too_long_is_refused(shared: World) -> None:
    ((status, _),) = talk(shared, in_pieces(request(shared, "GET /" + "a" * MOST_BYTES)))
    assert status == 431


def test_a_large_head_within_the_limit_is_read(shared: World) -> None:
    whole = request(shared, "GET /health/live", long_header(MOST_BYTES - 200))
    for pieces in ([whole], in_pieces(whole)):
        ((status, _),) = talk(shared, pieces)
        assert status == 200


def test_each_request_of_a_connection_has_the_limit_for_itself(shared: World) -> None:
    whole = request(shared, "GET /health/live", long_header(MOST_BYTES // 2))
    assert [status for status, _ in talk(shared, in_pieces(whole * 4), 4)] == [200] * 4


def test_what_is_no_head_is_not_counted(shared: World) -> None:
    """Large bodies, and a head that begins in the piece in which one ends."""
    vector = UNITS[0].tolist()
    body = json.dumps({"model": "old", "queries": [vector] * 900, "k": 1}).encode() + b" " * (4 * MOST_BYTES)
    search = request(shared, f"POST /galleries/{GALLERY}/search/batch", body=body)
    after = request(shared, "GET /health/live", long_header(MOST_BYTES // 2))
    whole = search + after
    cut = len(search) + MOST_BYTES // 2 - 1000
    for pieces in ([whole * 2], in_pieces(whole * 2), [whole[:cut], whole[cut:] + whole]):
        assert [status for status, _ in talk(shared, pieces, 4)] == [200] * 4


def test_a_request_that_is_being_answered_is_answered_before_the_next_is_refused(shared: World) -> None:
    body = json.dumps({"model": "old", "queries": [UNITS[0].tolist()] * 900, "k": 4}).encode()
    search = request(shared, f"POST /galleries/{GALLERY}/search/batch", body=body)
    (status, answer), *rest = talk(
        shared, [search, request(shared, "GET /health/live", long_header(3 * MOST_BYTES))], 2
    )
    assert (status, len(json.loads(answer)["results"])) == (200, 900)
    assert all(status == 431 for status, _ in rest)  # if there was time for it


@pytest.mark.parametrize("path", ["/nope", "/health/live"])
def test_trailers_without_an_end_close_the_connection(shared: World, path: str) -> None:
    """They come behind a body, whether the request was answered before or waits for them."""
    url = shared.client.base_url
    head = request(shared, f"GET {path}").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    trailers = [b"X-%d: " % n + b"a" * PIECE + b"\r\n" for n in range(64)]
    with closing(socket.create_connection((url.host, url.port or 80), timeout=PATIENCE_SECONDS)) as connection:
        connection.sendall(head + b"0\r\n")
        with pytest.raises(ConnectionError):  # closed while it is written to
            connection.sendall(b"".join(trailers * 64))


def test_a_body_in_many_small_chunks_with_trailers_is_read(shared: World) -> None:
    body = json.dumps({"model": "old", "vector": UNITS[0].tolist(), "k": 1}).encode() + b" " * 3000
    head = request(shared, f"POST /galleries/{GALLERY}/search").replace(
        b"Content-Length: 0", b"Transfer-Encoding: chunked"
    )
    chunks = b"".join(b"1;extension=%b\r\n%c\r\n" % (b"e" * 100, byte) for byte in body)
    whole = head + chunks + b"0\r\n" + long_header(1000) + b"\r\n\r\n"
    ((status, _),) = talk(shared, in_pieces(whole))
    assert status == 200


@pytest.mark.parametrize("offer", [b"h2c", b"websocket", b"TLS/1.0, h2c"])
@pytest.mark.parametrize("include", [[], ["payload"]], ids=["the short way", "the long way"])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_who_offers_to_go_on_in_another_protocol_is_answered_in_this_one(
    shared: World, offer: bytes, include: list[str], chunked: bool
) -> None:
    """Java's client does so with each request that is not encrypted, and sends its body behind the head or with it."""
    body = json.dumps({"model": "old", "vector": UNITS[2].tolist(), "k": 1, "include": include}).encode()
    offers = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: " + offer, b"HTTP2-Settings: AAMAAABk")
    search = request(shared, f"POST /galleries/{GALLERY}/search", *offers, body=body)
    if chunked:
        search = search.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked")
        search = search.removesuffix(body) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    after = request(shared, "GET /health/live", *offers)
    head = search.index(b"\r\n\r\n") + 4
    whole = search + after + search
    for pieces in (
        [whole],
        [whole[:head], whole[head:]],
        [whole[: head - 9], whole[head - 9 :]],
        [search, after, search],
    ):
        answered = talk(shared, pieces, 3)
        assert [status for status, _ in answered] == [200] * 3
        assert [json.loads(answered[at][1])["hits"][0]["id"] for at in (0, 2)] == ["item-2", "item-2"]


def test_thousands_of_offers_in_one_piece_are_declined_one_after_the_other(shared: World) -> None:
    offer = request(shared, "GET /health/live", b"Connection: upgrade", b"Upgrade: h2c")
    assert [status for status, _ in talk(shared, [offer * 2000], 2000)] == [200] * 2000


def test_a_tunnel_is_refused_once_whatever_else_it_offers(shared: World, caplog: pytest.LogCaptureFixture) -> None:
    for offers in ([], [b"Connection: upgrade", b"Upgrade: h2c"]):
        ((status, _),) = talk(shared, [request(shared, "CONNECT there:80", *offers)])
        assert status == 400
    assert not [each for each in caplog.records if each.name == "asyncio"]


NOT_HTTP = {
    "a method that nobody knows": b"FOO / HTTP/1.1\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\xfc",
    "a path that is not percent-encoded": "GET /galleries/photos/items/ü HTTP/1.1\r\n\r\n".encode(),
    "two lengths": b"POST /models HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a chunk without a size": b"POST /models HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
}


@pytest.mark.parametrize("sent", NOT_HTTP.values(), ids=NOT_HTTP)
def test_what_is_not_http_is_refused_with_a_problem_as_all_else_is(shared: World, sent: bytes) -> None:
    for before in ([], [request(shared, "GET /health/live")]):
        url = shared.client.base_url
        with closing(socket.create_connection((url.host, url.port or 80), timeout=PATIENCE_SECONDS)) as connection:
            read = answers(connection)
            for whole in before:
                connection.sendall(whole)
                assert next(read)[0] == 200
            connection.sendall(sent)
            ((status, body),) = read  # and the connection is closed
        assert (status, json.loads(body)["code"]) == (400, "invalid_http")


@pytest.mark.parametrize("sent", NOT_HTTP.values(), ids=NOT_HTTP)
def test_a_refusal_of_what_is_not_http_is_not_taken_for_the_answer_to_the_request_before_it(
    shared: World, sent: bytes
) -> None:
    body = json.dumps({"model": "old", "queries": [UNITS[0].tolist()] * 900, "k": 4}).encode()
    search = request(shared, f"POST /galleries/{GALLERY}/search/batch", body=body)
    (status, answer), *rest = talk(shared, [search + sent], 2)
    assert (status, len(json.loads(answer)["results"])) == (200, 900)
    assert all(status == 400 for status, _ in rest)  # if there was time for it
