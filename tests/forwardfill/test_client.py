"""The client against a service that answers as told: what it sends, and what it makes of the answers."""

from __future__ import annotations

import base64
import copy
import hashlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from forwardfill.answers import Json
from forwardfill.client import Client, ForwardfillError, UpgradeStoppedError
from forwardfill.errors import problem
from forwardfill.wire import encoded
from tests.forwardfill.answering import LIMITS, Recorder, client_of, upgrade

# --- connections ------------------------------------------------------------------------------------------------------


class Named(BaseHTTPRequestHandler):
    """Answers with the client's port, and keeps the connection."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = orjson.dumps({"port": self.client_address[1]})
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def here() -> Iterator[str]:
    """The URL of a server on this machine that tells which connection it was asked by."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Named) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class AllAtOnce:
    """A service that answers only once so many requests are under way; it knows how many connections they came by."""

    def __init__(self, at_once: int) -> None:
        self.ports: set[int] = set()
        barrier, ports = threading.Barrier(at_once, timeout=60), self.ports

        class Waits(Named):
            def do_GET(self) -> None:
                ports.add(self.client_address[1])
                barrier.wait()
                super().do_GET()

        self.handler = Waits


def test_threads_that_share_a_client_keep_their_connections_because_closing_one_could_hit_another_thread() -> None:
    service = AllAtOnce(32)
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), service.handler) as server,
        ThreadPoolExecutor(33) as pool,
        Client(f"http://127.0.0.1:{server.server_port}") as client,
    ):
        pool.submit(server.serve_forever)
        for _ in range(3):
            for asked in [pool.submit(client.info) for _ in range(32)]:
                asked.result()
        server.shutdown()
    assert len(service.ports) == 32


FORKS = """
import os, sys
from forwardfill.client import Client

client = Client(sys.argv[1])
before = client.info()["port"]
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, b"%d %d" % (client.info()["port"], client.info()["port"]))
    os._exit(0)
os.wait()
print(before, client.info()["port"], os.read(reader, 100).decode())
"""


def test_a_forked_process_has_connections_of_its_own_so_that_it_cannot_read_its_parents_answers(here: str) -> None:
    ran = subprocess.run([sys.executable, "-c", FORKS, here], capture_output=True, text=True, timeout=60, check=True)
    before, after, of_the_child, again = ran.stdout.split()
    assert before == after
    assert of_the_child == again != before


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "socks://127.0.0.1:9"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_proxy_for_the_rest_of_the_world_is_not_asked_for_what_is_on_this_machine(
    here: str, monkeypatch: pytest.MonkeyPatch, variable: str, proxy: str, host: str
) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv(variable, proxy)
    with Client(here.replace("127.0.0.1", host)) as client:
        assert client.info()["port"]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_problem_becomes_an_error_with_its_code_its_pointers_and_its_request() -> None:
    problem = {
        "type": "about:blank",
        "title": "Conflict",
        "status": 409,
        "detail": "an upgrade that is paused takes no cutover",
        "code": "invalid_state_transition",
        "request_id": "01JD5K",
        "errors": [{"pointer": "/id", "detail": "no"}],
        "allowed": ["resume", "cancel"],
    }
    with client_of(lambda _: httpx.Response(409, json=problem)) as client, pytest.raises(ForwardfillError) as caught:
        client.cutover("01JD")
    error = caught.value
    assert (error.status, error.code, error.request_id) == (409, "invalid_state_transition", "01JD5K")
    assert error.errors == [{"pointer": "/id", "detail": "no"}]
    assert error.problem["allowed"] == ["resume", "cancel"]
    assert "takes no cutover" in str(error)


def test_an_error_page_of_something_before_the_service_is_an_error_too() -> None:
    client = client_of(lambda _: httpx.Response(502, text="<h1>Bad gateway</h1>"))
    with client, pytest.raises(ForwardfillError, match="Bad gateway") as caught:
        client.info()
    assert (caught.value.status, caught.value.code) == (502, "not_a_problem")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("2", 2.0), ("0.5", 0.5), (None, None), ("soon", None), ("-1", None), ("nan", None)],
)
@pytest.mark.parametrize("body", [{"json": {"status": 429, "code": "c", "detail": "d"}}, {"text": "Slow down"}])
def test_an_error_says_when_to_come_again_where_the_answer_does(
    body: dict[str, Any], header: str | None, seconds: float | None
) -> None:
    headers = {} if header is None else {"retry-after": header}
    with client_of(lambda _: httpx.Response(429, headers=headers, **body)) as client:
        with pytest.raises(ForwardfillError) as caught:
            client.info()
        assert caught.value.retry_after == seconds
        with pytest.raises(ForwardfillError) as caught:
            next(client.events("01JD"))
        assert caught.value.retry_after == seconds


def test_a_moment_to_come_again_is_told_in_seconds() -> None:
    soon, past = (format_datetime(datetime.now(UTC) + timedelta(seconds=each), usegmt=True) for each in (60, -60))
    for header, seconds in ((soon, 60.0), (past, 0.0)):
        told = problem(httpx.Response(503, headers={"retry-after": header})).retry_after
        assert told == pytest.approx(seconds, abs=5)


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("https://service/info?token=geheim", "leads to https://service/info; use https://service instead"),
        ("/info/", "leads to http://service/info/; use"),
        ("https://sign.in/start", "leads to https://sign.in/start; use"),
    ],
)
def test_a_redirect_says_where_it_leads_because_that_is_the_url_to_use(location: str, told: str) -> None:
    with client_of(lambda _: httpx.Response(307, headers={"location": location})) as client:
        for call in (client.info, lambda: next(client.events("01JD"))):
            with pytest.raises(ForwardfillError) as caught:
                call()
            assert (caught.value.status, caught.value.code) == (307, "not_a_problem")
            assert "geheim" not in str(caught.value)
        with pytest.raises(ForwardfillError, match=told):
            client.info()


@pytest.mark.parametrize("body", [{"status": "error", "errors": True}, {"errors": ["no"], "detail": "d"}])
def test_a_refusal_in_somebody_elses_json_is_an_error_too(body: Json) -> None:
    client = client_of(lambda _: httpx.Response(502, json=body))
    with client, pytest.raises(ForwardfillError) as caught:
        client.info()
    assert (caught.value.status, caught.value.code, caught.value.errors) == (502, "unknown", [])


@pytest.mark.parametrize(
    "call",
    [
        Client.info,
        Client.models,
        lambda client: client.upload_artifact(Path(__file__)),
        lambda client: client.delete_gallery("photos"),
        lambda client: client.upsert_arrow("photos", "old", b""),
        lambda client: client.start_fit("photos", b"", name="f", target="new"),
        lambda client: list(client.events("01JD")),
    ],
    ids=["info", "a list", "an artifact", "a delete", "an upsert", "a fit", "events"],
)
def test_a_success_that_is_not_the_services_is_an_error(call: Callable[[Client], object]) -> None:
    client = client_of(lambda _: httpx.Response(200, html="<h1>Sign in</h1>"))
    told = "http://service is no Forwardfill service: it sent text/html"
    with client, pytest.raises(ForwardfillError, match=told) as caught:
        call(client)
    assert (caught.value.status, caught.value.code) == (200, "not_a_problem")


def test_json_that_is_no_object_is_not_the_services() -> None:
    client = client_of(lambda _: httpx.Response(200, json=["hello"]))
    with client, pytest.raises(ForwardfillError, match="it sent application/json"):
        client.info()


def test_a_stream_of_events_that_is_refused_is_an_error_like_any_other() -> None:
    problem = {"status": 404, "code": "upgrade_not_found", "detail": "no such upgrade"}
    client = client_of(lambda _: httpx.Response(404, json=problem))
    with client, pytest.raises(ForwardfillError, match="upgrade_not_found"):
        list(client.events("01JD"))


class Refused(ForwardfillError):
    """Somebody's own, with a constructor of its own."""

    def __init__(self, why: ForwardfillError, *, at: str) -> None:
        super().__init__(why.status, why.code, why.detail)
        self.at = at


def raised(error: Exception) -> Exception:
    """With what a traceback may add to it."""
    error.add_note("while the photos were written")
    return error


STOPPED = UpgradeStoppedError(upgrade("failed", error="no disk"))  # type: ignore[arg-type]
PROBLEM = problem(httpx.Response(409, json={"status": 409, "code": "c", "detail": "d", "errors": [{"pointer": "/a"}]}))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("error", [PROBLEM, STOPPED, Refused(PROBLEM, at="noon")], ids=lambda each: type(each).__name__)
def test_an_error_is_the_same_in_another_process(error: Exception, again: Callable[[Exception], Exception]) -> None:
    found = again(raised(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert found.args == error.args
    assert vars(found) == vars(error)


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_the_key_is_sent_as_a_bearer_token() -> None:
    service = Recorder({})
    with client_of(service, api_key="secret") as client:
        client.health()
    assert service.requests[0].headers["authorization"] == "Bearer secret"


@pytest.mark.parametrize("key", ["geheim\n", "geheim\r\n", "geheim geheim", "gehe\u00efm", ""])
def test_what_is_no_key_is_refused_at_once_and_not_told(key: str) -> None:
    with pytest.raises(ValueError, match="api_key: is empty, or has spaces, a line's end") as caught:
        Client("http://service", api_key=key)
    assert "gehe" not in str(caught.value)


def test_names_and_ids_cannot_leave_their_place_in_the_path() -> None:
    service = Recorder({})
    with client_of(service) as client:
        client.item("photos", "../a b?c/ü")
    assert service.requests[0].url.raw_path == b"/galleries/photos/items/..%2Fa%20b%3Fc%2F%C3%BC"


def test_vectors_travel_as_base64_of_little_endian_float32() -> None:
    assert encoded([1.5, -2.0]) == base64.b64encode(np.array([1.5, -2.0], "<f4").tobytes()).decode()
    assert encoded(np.eye(2, dtype=np.float64)) == [encoded([1, 0]), encoded([0, 1])]
    with pytest.raises(ValueError, match="shape"):
        encoded(3.0)


def test_an_upsert_is_split_at_the_limit_of_items() -> None:
    service = Recorder({"upserted": 4, "version": 7})
    ids = [f"i{at}" for at in range(10)]
    with client_of(service) as client:
        version = client.upsert("photos", "old", ids=ids, embeddings=np.eye(10), side_information=np.ones((10, 3)))
    assert version == 7
    assert [[item["id"] for item in body["items"]] for body in service.bodies] == [ids[:4], ids[4:8], ids[8:]]
    assert service.bodies[2]["items"][1] == {
        "id": "i9",
        "embedding": encoded(np.eye(10)[9]),
        "side_information": encoded(np.ones(3)),
    }


def test_an_upsert_is_split_at_the_limit_of_bytes() -> None:
    service = Recorder({"upserted": 1, "version": 1})
    with client_of(service) as client:
        client.upsert("photos", "old", ids=["a", "b", "c"], embeddings=np.ones((3, 100_000)))
    assert [len(body["items"]) for body in service.bodies] == [1, 1, 1]
    assert all(len(request.content) < LIMITS["limits"]["max_body_bytes"] for request in service.requests)


class Narrow(Recorder):
    """Behind a proxy that takes bodies of so many bytes."""

    def __init__(self, answer: Any, most: int) -> None:
        super().__init__(answer)
        self._most = most

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if len(request.content) > self._most:
            return httpx.Response(413, html="<h1>Request Entity Too Large</h1>")
        return super().__call__(request)


def test_what_is_too_large_for_a_proxy_is_written_and_deleted_in_halves() -> None:
    ids = ["a", "b", "c", "d"]
    service = Narrow({"version": 3, "deleted": 1, "missing": ["d"]}, 1500)
    with client_of(service) as client:
        assert client.upsert("photos", "old", ids=ids, embeddings=np.eye(4, 200)) == 3
        assert [[item["id"] for item in body["items"]] for body in service.bodies] == [["a"], ["b"], ["c"], ["d"]]
        service.requests.clear()
        deleted = client.delete_items("photos", [each * 400 for each in ids])
    assert [len(body["ids"]) for body in service.bodies] == [2, 2]
    assert deleted == {"deleted": 2, "missing": ["d", "d"]}


def test_an_item_that_is_too_large_by_itself_is_refused() -> None:
    service = Narrow({"version": 3}, 1500)
    with client_of(service) as client, pytest.raises(ForwardfillError, match="Too Large") as caught:
        client.upsert("photos", "old", ids=["a", "b"], embeddings=np.eye(2, 2000))
    assert caught.value.status == 413


@pytest.mark.parametrize("batch", [0, -1])
def test_fewer_than_one_item_in_a_request_is_refused(batch: int) -> None:
    service = Recorder({"version": 1})
    with client_of(service) as client, pytest.raises(ValueError, match="batch"):
        client.upsert("photos", "old", ids=["a", "b"], embeddings=np.eye(2), batch=batch)
    assert service.requests == []


@pytest.mark.parametrize("name", [".", ".."])
def test_a_name_of_dots_asks_for_nothing_else(name: str) -> None:
    service = Recorder({})
    with client_of(service) as client:
        client.item("photos", name)
    assert service.requests[0].url.path == f"/galleries/photos/items/{name}"


@pytest.mark.parametrize("nothing", [[], np.empty((0, 3))], ids=["a list", "an array"])
def test_an_upsert_of_nothing_sends_nothing(nothing: Any) -> None:
    service = Recorder({})
    with client_of(service) as client:
        assert client.upsert("photos", "old", ids=[], embeddings=nothing, side_information=nothing, payloads=[]) == 0
    assert service.requests == []


def test_a_delete_is_split_and_its_answers_are_added() -> None:
    service = Recorder({"deleted": 3, "missing": ["x"]})
    with client_of(service) as client:
        assert client.delete_items("photos", [str(at) for at in range(6)]) == {"deleted": 6, "missing": ["x", "x"]}
    assert [len(body["ids"]) for body in service.bodies] == [4, 2]


def test_an_artifact_is_put_under_the_digest_of_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "h.safetensors"
    file.write_bytes(bytes(range(256)) * 5000)
    service = Recorder({})
    with client_of(service) as client:
        digest = client.upload_artifact(file)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert service.requests[0].url.path == f"/artifacts/{digest}"
    assert service.requests[0].content == file.read_bytes()
    assert "transfer-encoding" not in service.requests[0].headers


def test_a_batch_carries_the_companions_of_each_query() -> None:
    service = Recorder({"results": []})
    with client_of(service) as client:
        client.search_batch("photos", "new", np.eye(2), companions={"old": np.ones((2, 3))}, k=5)
    assert service.bodies[0] == {
        "model": "new",
        "k": 5,
        "queries": [{"vector": encoded(row), "companions": {"old": encoded(np.ones(3))}} for row in np.eye(2)],
    }


def test_what_is_not_asked_for_is_left_to_the_service() -> None:
    service = Recorder({"hits": []})
    with client_of(service) as client:
        client.search("photos", "new", np.ones(2))
    assert service.bodies[0] == {"model": "new", "vector": encoded(np.ones(2))}


def test_probes_carry_their_vectors_of_every_model_and_what_is_relevant() -> None:
    service = Recorder({})
    with client_of(service) as client:
        client.set_probes("photos", {"old": np.ones((1, 2)), "new": np.zeros((1, 3))}, relevant=[["a", "b"]])
    vectors = {"old": encoded(np.ones(2)), "new": encoded(np.zeros(3))}
    assert service.bodies[0] == {"probes": [{"vectors": vectors, "relevant": ["a", "b"]}]}


def test_a_list_is_read_to_its_last_page() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        second = request.url.params.get("page_token") == "more"
        page = {"models": [{"name": "b" if second else "a"}], "next_page_token": None if second else "more"}
        return httpx.Response(200, json=page)

    with client_of(answer) as client:
        assert [model["name"] for model in client.models()] == ["a", "b"]


def test_an_upgrade_can_be_started_at_a_service_that_is_older_than_the_client() -> None:
    recorder = Recorder({"id": "01JD"})
    with client_of(recorder) as client:
        client.start_upgrade("photos", target_model="new")
        client.start_upgrade("photos", target_model="new", on_contradicting_items="ignore")
    known = {"gallery", "target_model", "cutover", "order", "on_missing_side_information", "dry_run"}
    assert [body.keys() - known for body in recorder.bodies] == [set(), {"on_contradicting_items"}]
