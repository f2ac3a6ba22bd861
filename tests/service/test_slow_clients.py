"""Clients that send slowly, or not at all, hold up nobody but themselves."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from service import process
from service.api import fits, items
from service.app import SUBJECTS
from service.arrow import MEDIA_TYPE as ARROW
from service.bodies import Json
from tests.acceptance.system import wait_for
from tests.service.world import GALLERY, UNITS, World, opened

PATIENCE_SECONDS = 20.0
ITEMS = f"/galleries/{GALLERY}/items"
SEARCH = f"/galleries/{GALLERY}/search"
JSON = "application/json"


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A service that takes two requests at once, and lets none wait."""
    limits = {
        f"max_{how}_{what}": most
        for how, most in (("concurrent", 2), ("waiting", 0))
        for what in ("searches", "requests")
    }
    with opened(tmp_path_factory.mktemp("tight"), **limits) as world:
        yield world.prepared().filled()


@contextmanager
def begun(
    world: World, request: str, *, kind: str = JSON, said: int = 200, sent: bytes = b"{"
) -> Iterator[socket.socket]:
    """A connection on which the service waits for the rest of a body: it has asked for it."""
    host, port = world.client.base_url.host, world.client.base_url.port
    head = f"{request} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: {kind}\r\nContent-Length: {said}\r\n"
    with closing(socket.create_connection((host, port or 80), timeout=PATIENCE_SECONDS)) as connection:
        connection.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(sent)
        yield connection


def answered(connection: socket.socket) -> tuple[bytes, dict[str, object]]:
    """The head of an answer, and its problem; the service has closed the connection after it."""
    answer = b""
    while part := connection.recv(1 << 16):
        answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, json.loads(body)


def test_every_route_takes_its_slot_once_the_body_is_there() -> None:
    """FastAPI asks for what a handler depends on in the order of its parameters."""
    slots, asked = (process._request_slot, process._search_slot), (items._new_items, fits._asked)
    judged = 0
    for route in chain.from_iterable(subject.router.routes for subject in SUBJECTS):
        assert isinstance(route, APIRoute)
        calls = [each.call for each in route.dependant.dependencies]
        bodies = [at for at, call in enumerate(calls) if isinstance(call, Json) or call in asked]
        taken = [at for at, call in enumerate(calls) if call in slots]
        if bodies and taken:
            judged += 1
            assert bodies[-1] < taken[0], route.path
    assert judged >= 18


@pytest.mark.parametrize(
    ("request_line", "kind"),
    [
        (f"POST {ITEMS}", JSON),
        (f"POST {ITEMS}", ARROW),
        (f"POST {ITEMS}/delete", JSON),
        (f"POST {SEARCH}", JSON),
        (f"POST {SEARCH}/batch", JSON),
        (f"POST {SEARCH}/explain", JSON),
        ("POST /models", JSON),
        ("POST /galleries", JSON),
        (f"PUT /galleries/{GALLERY}/probes", JSON),
        ("PUT /artifacts/" + "0" * 64, "application/octet-stream"),
        ("POST /transformations", JSON),
        ("POST /transformations/fit", JSON),
        (f"POST /transformations/fit?gallery={GALLERY}&name=a&target=new", ARROW),
        ("POST /transformations/old-to-new/evaluate", JSON),
        ("POST /admin/upgrades", JSON),
        ("PATCH /admin/upgrades/x", JSON),
        ("POST /admin/upgrades/x/pause", JSON),
        ("POST /admin/upgrades/x/cutover", JSON),
        ("POST /admin/upgrades/x/rollback", JSON),
    ],
)
def test_who_sends_a_body_slowly_holds_no_slot(tight: World, request_line: str, kind: str) -> None:
    with begun(tight, request_line, kind=kind), begun(tight, request_line, kind=kind):
        assert tight.get("/models")["models"]
        assert tight.old_search(0, k=101)["hits"]


def test_files_that_come_slowly_are_limited_among_themselves(tight: World) -> None:
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(begun(tight, f"POST {ITEMS}", kind=ARROW))
        tight.refused(tight.client.put("/artifacts/" + "0" * 64, content=b"x"), 429, "overloaded")
    again = lambda: tight.client.put("/artifacts/" + "0" * 64, content=b"x").status_code == 422  # noqa: E731
    wait_for(again, PATIENCE_SECONDS, lambda: "the slots were not given back")


@pytest.mark.parametrize(
    ("request_line", "kind", "said"),
    [
        (f"POST {ITEMS}", JSON, 200),
        (f"POST {ITEMS}", ARROW, 200),
        (f"POST {SEARCH}", JSON, 200),  # so short that it might be answered before FastAPI
        (f"POST {SEARCH}", JSON, 1 << 20),
        ("PUT /artifacts/" + "0" * 64, "application/octet-stream", 200),
    ],
)
def test_a_body_of_which_nothing_comes_any_more_is_given_up(
    tmp_path: Path, request_line: str, kind: str, said: int
) -> None:
    with opened(tmp_path, body_idle_seconds=0.2) as world:
        world.prepared()
        with begun(world, request_line, kind=kind, said=said) as connection:
            head, problem = answered(connection)
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in head.lower()
        assert (problem["code"], problem["status"]) == ("request_timeout", 408)
        assert "body_idle_seconds" in str(problem["detail"])
        assert not list((world.folder / "data").rglob("*.part"))


def test_an_answer_of_which_nothing_is_read_any_more_is_given_up(tmp_path: Path) -> None:
    with opened(tmp_path, body_idle_seconds=0.2) as world:
        world.prepared()
        items = [{"id": "x" * 500 + str(at), "embedding": UNITS[0].tolist()} for at in range(1000)]
        world.post(ITEMS, {"model": "old", "items": items})
        body = json.dumps({"model": "old", "queries": [UNITS[0].tolist()] * 30, "k": 1000}).encode()
        host, port = world.client.base_url.host, world.client.base_url.port
        head = f"POST {SEARCH}/batch HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n\r\n"
        with closing(socket.create_connection((host, port or 80), timeout=PATIENCE_SECONDS)) as connection:
            connection.sendall(head.encode() + body)
            poll = select.poll()
            poll.register(connection, select.POLLHUP | select.POLLERR)
            assert poll.poll(PATIENCE_SECONDS * 1000), "the connection is kept"
        assert world.get("/models")["models"]


def test_a_long_answer_that_is_read_slowly_comes_whole(tmp_path: Path) -> None:
    with opened(tmp_path, body_idle_seconds=1.5) as world:
        world.prepared()
        items = [{"id": "x" * 500 + str(at), "embedding": UNITS[0].tolist()} for at in range(1000)]
        world.post(ITEMS, {"model": "old", "items": items})
        body = {"model": "old", "queries": [UNITS[0].tolist()] * 30, "k": 1000}
        whole = bytearray()
        with world.client.stream("POST", f"{SEARCH}/batch", json=body) as answer:
            for part in answer.iter_raw(1 << 20):
                whole += part
                threading.Event().wait(0.2)
        assert len(json.loads(whole)["results"]) == 30


def test_bodies_that_wait_have_room_together_for_as_much_as_the_requests_at_once(tmp_path: Path) -> None:
    limits = {"max_concurrent_requests": 2, "max_body_bytes": 1 << 20}
    mebibyte = b"{" + b" " * ((1 << 20) - 1)
    with opened(tmp_path, **limits) as world, ExitStack() as stack:
        world.prepared()
        senders = [
            stack.enter_context(begun(world, f"POST {path}", said=1 << 20, sent=mebibyte[:-1]))
            for path in (ITEMS, f"{SEARCH}/batch", f"{ITEMS}/delete")
        ]
        (refused,), _, _ = select.select(senders, [], [], PATIENCE_SECONDS)  # whoever came last
        assert refused.recv(1 << 16).startswith(b"HTTP/1.1 429 ")
        assert world.upsert({"id": "small", "embedding": [1.0, 0.0, 0.0, 0.0]})["upserted"] == 1
        stack.close()
        again = lambda: world.client.post(f"{ITEMS}/delete", content=mebibyte).status_code == 400  # noqa: E731
        wait_for(again, PATIENCE_SECONDS, lambda: "the room was not given back")
