"""The client against a service that answers as told: what it sends, and what it makes of the answers."""

from __future__ import annotations

import base64
import copy
import hashlib
import math
import pickle
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pyarrow as pa
import pytest
import torch

from forwardfill.answers import Json
from forwardfill.client import Client, ForwardfillError, UpgradeStoppedError
from forwardfill.errors import problem
from forwardfill.pairs import from_files, stream
from forwardfill.wire import encoded, parse_events

Handler = Callable[[httpx.Request], httpx.Response]

LIMITS = {"limits": {"max_items_per_upsert": 4, "max_body_bytes": 1 << 20}}


def client_of(handler: Handler, **options: Any) -> Client:
    return Client("http://service", transport=httpx.MockTransport(handler), **options)


def upgrade(state: str, **more: Any) -> dict[str, Any]:
    return {"id": "01JD", "state": state, "error": None, "conditions": [], **more}


#: as the service tells of a pause that its gate made
CLOSED = [
    {"type": "paused", "reason": "gate_closed", "detail": "its gate closed; resume it with POST .../resume"},
    {"type": "gate_closed", "reason": "min_cmc1", "detail": "CMC-1 is 0.5, below 0.9"},
]
ASKED_FOR = [{"type": "paused", "reason": "requested", "detail": "paused as somebody asked for"}]


class Recorder:
    """Answers every request alike and keeps the bodies; `/info` gives small limits."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/info":
            return httpx.Response(200, json=LIMITS)
        self.requests.append(request)
        return httpx.Response(200, json=self.answer)

    @property
    def bodies(self) -> list[Any]:
        return [orjson.loads(request.content) for request in self.requests]


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


ONE: Any = np.ones((1, 3))
NOT_REAL: Any = ONE * 1j


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("embeddings", lambda client: client.upsert("photos", "old", ids=["a"], embeddings=NOT_REAL)),
        (
            "side_information",
            lambda client: client.upsert("photos", "old", ids=["a"], embeddings=ONE, side_information=NOT_REAL),
        ),
        ("vector", lambda client: client.search("photos", "old", NOT_REAL[0])),
        ("companions of old", lambda client: client.search("photos", "new", ONE[0], companions={"old": NOT_REAL[0]})),
        ("vectors", lambda client: client.search_batch("photos", "old", NOT_REAL)),
        ("companions of old", lambda client: client.search_batch("photos", "new", ONE, companions={"old": NOT_REAL})),
        ("vectors of old", lambda client: client.set_probes("photos", {"old": NOT_REAL})),
        (
            "target_embeddings",
            lambda client: client.evaluate("t", source_embeddings=ONE, target_embeddings=NOT_REAL),
        ),
        ("embeddings", lambda _: stream(["a"], NOT_REAL)),
    ],
)
def test_vectors_that_are_not_real_are_refused_by_the_argument_and_nothing_is_sent(
    name: str, call: Callable[[Client], object]
) -> None:
    service = Recorder({"version": 1})
    with (
        client_of(service) as client,
        pytest.raises(ValueError, match=f"^{name}: vectors are real numbers, not complex"),
    ):
        call(client)
    assert service.requests == []


def test_a_data_frames_column_of_vectors_is_refused_with_what_makes_an_array_of_it() -> None:
    column = np.empty(2, object)  # as np.asarray makes of a pandas or polars column
    column[:] = [np.ones(3, np.float32), np.zeros(3, np.float32)]
    with pytest.raises(ValueError, match=r"^embeddings: .* not object; make one array of these rows with np.stack$"):
        stream(["a", "b"], column)
    stream(["a", "b"], np.stack(column))
    with pytest.raises(ValueError, match="not object; convert them to float32"):
        stream(["a", "b"], np.array([[1, None], [2, 3]]))


@pytest.mark.parametrize("vector", [[True, False], ["1.5", "2"], np.array([3, 4], "datetime64[s]"), [None, 1.0]])
def test_what_numpy_would_read_numbers_into_is_no_vector(vector: Any) -> None:
    with pytest.raises(ValueError, match="real numbers"):
        encoded(vector)


@pytest.mark.parametrize(
    "given",
    [
        torch.ones(1, 2, dtype=torch.bfloat16),
        torch.ones(1, 2, requires_grad=True),
        [[1.0, 2.0], [1.0]],
        np.ma.array([[1.0, 2.0]], mask=[[False, True]]),  # type: ignore[no-untyped-call]
    ],
    ids=["of a type that NumPy lacks", "that is being trained", "of different lengths", "masked"],
)
def test_vectors_that_cannot_be_read_as_they_are_are_refused_by_the_argument(given: Any) -> None:
    service = Recorder({"version": 1})
    with client_of(service) as client, pytest.raises(ValueError, match=r"^embeddings: "):
        client.upsert("photos", "old", ids=["a"], embeddings=given)
    assert service.requests == []


@pytest.mark.parametrize("name", [".", ".."])
def test_a_name_of_dots_asks_for_nothing_else(name: str) -> None:
    service = Recorder({})
    with client_of(service) as client:
        client.item("photos", name)
    assert service.requests[0].url.path == f"/galleries/photos/items/{name}"


@pytest.mark.parametrize("kind", ["i1", "u8", ">f8", "f2", "g"])
def test_real_numbers_of_any_type_are_vectors(kind: Any) -> None:
    assert encoded(np.array([1, 2], kind)) == encoded([1.0, 2.0])


@pytest.mark.parametrize("nothing", [[], np.empty((0, 3))], ids=["a list", "an array"])
def test_an_upsert_of_nothing_sends_nothing(nothing: Any) -> None:
    service = Recorder({})
    with client_of(service) as client:
        assert client.upsert("photos", "old", ids=[], embeddings=nothing, side_information=nothing, payloads=[]) == 0
    assert service.requests == []


def test_an_upsert_of_columns_of_different_length_sends_nothing() -> None:
    service = Recorder({})
    with client_of(service) as client, pytest.raises(ValueError, match="2 ids, but 3 embeddings"):
        client.upsert("photos", "old", ids=["a", "b"], embeddings=np.eye(3))
    assert service.requests == []


PAYLOADS = [{"at": 0}, None, {"at": 2}]


@pytest.mark.parametrize("given", [iter, tuple, lambda payloads: np.array(payloads, object)])
def test_payloads_may_come_in_whatever_can_be_iterated_over(given: Callable[[list[Any]], Any]) -> None:
    listed, other = (Recorder({"version": 1}) for _ in range(2))
    for service, payloads in ((listed, PAYLOADS), (other, given(PAYLOADS))):
        with client_of(service) as client:
            client.upsert("photos", "old", ids=["a", "b", "c"], embeddings=np.eye(3), payloads=payloads)
    assert other.bodies == listed.bodies
    assert [item.get("payload") for item in listed.bodies[0]["items"]] == PAYLOADS


@pytest.mark.parametrize("payloads", [{"a": {"at": 0}}, {"at": 0}, "a", b"a"])
def test_one_payload_or_payloads_by_id_are_no_list_of_payloads(payloads: Any) -> None:
    service = Recorder({"version": 1})
    with client_of(service) as client, pytest.raises(TypeError, match=r"^payloads: .* one for each id, in their order"):
        client.upsert("photos", "old", ids=["a"], embeddings=np.eye(1), payloads=payloads)
    assert service.requests == []


@pytest.mark.parametrize("vectors", [[[1.0, 2.0]], np.eye(2), "old"], ids=["a list", "an array", "a text"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("companions", lambda client, given: client.search("photos", "new", [1.0], companions=given)),
        ("companions", lambda client, given: client.explain("photos", "new", [1.0], companions=given)),
        ("companions", lambda client, given: client.search_batch("photos", "new", np.eye(1), companions=given)),
        ("vectors", lambda client, given: client.set_probes("photos", given)),
    ],
)
def test_vectors_of_no_model_are_refused_where_each_model_has_its_own(
    name: str, call: Callable[[Client, Any], object], vectors: Any
) -> None:
    service = Recorder({"results": []})
    told = f"^{name}: vectors by the model's name, as {{'MODEL': "
    with client_of(service) as client, pytest.raises(TypeError, match=told):
        call(client, vectors)
    assert service.requests == []


def test_a_delete_is_split_and_its_answers_are_added() -> None:
    service = Recorder({"deleted": 3, "missing": ["x"]})
    with client_of(service) as client:
        assert client.delete_items("photos", [str(at) for at in range(6)]) == {"deleted": 6, "missing": ["x", "x"]}
    assert [len(body["ids"]) for body in service.bodies] == [4, 2]


TAKE_IDS: dict[str, Callable[[Client, Any], object]] = {
    "delete": lambda client, ids: client.delete_items("photos", ids),
    "upsert": lambda client, ids: client.upsert("photos", "old", ids=ids, embeddings=np.eye(3)),
    "probes": lambda client, ids: client.set_probes("photos", {"old": np.eye(1)}, relevant=[ids]),
    "pairs": lambda _, ids: stream(ids, np.eye(3)),
}


@pytest.mark.parametrize("call", TAKE_IDS.values(), ids=TAKE_IDS)
@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ("123", "'123' is one, not several; put it into a list"),
        (b"123", "b'123' is one, not several"),
        (["a", 2, 3], r"number 1 is 2, of type int; an id is a text: convert with str\(\)"),
        (["a", "b", uuid.UUID(int=7)], "number 2 is UUID"),
        (np.arange(3), "number 0 is .*, of type int64"),
    ],
    ids=["one text", "bytes", "numbers", "UUIDs", "an array of numbers"],
)
def test_one_text_is_no_list_of_ids_and_nothing_but_texts_are_ids(
    call: Callable[[Client, Any], object], ids: Any, told: str
) -> None:
    service = Recorder({"version": 1, "deleted": 1, "missing": []})
    with client_of(service) as client, pytest.raises(TypeError, match=told):
        call(client, ids)
    assert service.requests == []


LABELLED: dict[str, Callable[[Client, Any], object]] = {
    "evaluate": lambda client, labels: client.evaluate(
        "t", source_embeddings=np.eye(3), target_embeddings=np.eye(3), labels=labels
    ),
    "pairs": lambda _, labels: stream(["a", "b", "c"], np.eye(3), labels),
}


@pytest.mark.parametrize("call", LABELLED.values(), ids=LABELLED)
@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ("abc", "'abc' is one, not several"),
        (["x", None, "y"], "number 1 is None"),
        (["x", "y", math.nan], "number 2 is nan"),
        (np.array([1.0, 2.0, math.nan]), "number 0 is"),
    ],
)
def test_what_is_no_label_is_refused_by_its_number_and_nothing_is_sent(
    call: Callable[[Client, Any], object], labels: Any, told: str
) -> None:
    service = Recorder({})
    with client_of(service) as client, pytest.raises(TypeError, match=told):
        call(client, labels)
    assert service.requests == []


@pytest.mark.parametrize(
    "labels", [[1, 2, 1], np.array([1, 2, 1]), torch.tensor([1, 2, 1]), (each for each in [1, 2, 1])]
)
def test_labels_may_be_whole_numbers_in_whatever_can_be_iterated_over(labels: Any) -> None:
    service = Recorder({})
    with client_of(service) as client:
        LABELLED["evaluate"](client, labels)
    assert service.bodies[0]["labels"] == [1, 2, 1]


def test_a_line_of_ids_ends_where_an_import_ends_it(tmp_path: Path) -> None:
    ids = ["one", "two\u2028still two", "three\x1e"]
    (tmp_path / "ids.txt").write_text("".join(f"{each}\r\n" for each in ids), encoding="utf-8-sig", newline="")
    np.save(tmp_path / "new.npy", np.eye(3))
    written = pa.ipc.open_stream(
        from_files(tmp_path / "ids.txt", tmp_path / "new.npy", tmp_path / "ids.txt")
    ).read_all()
    assert written.column("id").to_pylist() == written.column("label").to_pylist() == ids


@pytest.mark.parametrize("call", TAKE_IDS.values(), ids=TAKE_IDS)
@pytest.mark.parametrize("given", [iter, tuple, dict.fromkeys, lambda ids: dict.fromkeys(ids).keys(), np.array])
def test_ids_may_come_in_whatever_can_be_iterated_over(
    call: Callable[[Client, Any], object], given: Callable[[list[str]], Any]
) -> None:
    listed, other = (Recorder({"version": 1, "deleted": 1, "missing": []}) for _ in range(2))
    with client_of(listed) as client:
        expected = call(client, ["a", "b", "c"])
    with client_of(other) as client:
        assert call(client, given(["a", "b", "c"])) == expected
    assert other.bodies == listed.bodies


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


NINE: Any = np.ones((9, 3))


@pytest.mark.parametrize(
    ("told", "call"),
    [
        (
            "2 vectors, but 9 companions of new",
            lambda client: client.search_batch("photos", "old", ONE.repeat(2, 0), companions={"new": NINE}),
        ),
        (
            "9 vectors, but 1 companions of new",
            lambda client: client.search_batch("photos", "old", NINE, companions={"old": NINE, "new": ONE}),
        ),
        (
            "1 vectors of new, but 9 vectors of old",
            lambda client: client.set_probes("photos", {"new": ONE, "old": NINE}),
        ),
        (
            "9 vectors of old, but 1 vectors of new",
            lambda client: client.set_probes("photos", {"old": NINE, "new": ONE}),
        ),
        (
            "9 vectors of old, but 1 lists of relevant ids",
            lambda client: client.set_probes("photos", {"old": NINE}, relevant=[["a"]]),
        ),
        ("9 embeddings, but 2 ids", lambda _: stream(["a", "b"], NINE)),
        ("1 embeddings, but 2 labels", lambda _: stream(["a"], ONE, [1, 2])),
    ],
)
def test_rows_that_do_not_fit_are_refused_with_both_numbers_and_nothing_is_sent(
    told: str, call: Callable[[Client], object]
) -> None:
    service = Recorder({"results": []})
    with client_of(service) as client, pytest.raises(ValueError, match=f"^{told}$"):
        call(client)
    assert service.requests == []


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


# --- events -----------------------------------------------------------------------------------------------------------

STREAM = (
    ': a comment\n\nid: 41\nevent: state\ndata: {"state":"running",\ndata: "at":"\u2028now"}\n\n'
    'event: progress\ndata: {"fraction":0.5}\r\n\r\nevent: nothing\n\ndata: {"unfinished":1}\n'
)


class Drops(httpx.SyncByteStream):
    """A stream in awkward pieces, which breaks at its end if asked to."""

    def __init__(self, text: str, *, breaks: bool = False) -> None:
        self._bytes = text.encode()
        self._breaks = breaks

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self._bytes), 3):
            yield self._bytes[start : start + 3]
        if self._breaks:
            raise httpx.ReadError("the connection was lost")


def test_events_have_a_name_data_and_the_last_id_and_an_unfinished_one_is_none() -> None:
    events = list(parse_events(STREAM.replace("\r", "").removesuffix("\n").split("\n")))
    assert [(event.name, event.data, event.id) for event in events] == [
        ("state", {"state": "running", "at": "\u2028now"}, "41"),
        ("progress", {"fraction": 0.5}, "41"),
    ]


def test_events_survive_any_cut_of_the_stream() -> None:
    with client_of(lambda _: httpx.Response(200, stream=Drops(STREAM))) as client:
        assert [event.name for event in client.events("01JD")] == ["state", "progress"]


class Upgrades:
    """An upgrade that is in the next state each time it is asked for; its streams tell so, or break."""

    def __init__(self, *states: str, breaks: bool = False) -> None:
        self._states = list(states)
        self._breaks = breaks
        self.seen: list[str | None] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
            return httpx.Response(200, json=upgrade(state))
        self.seen.append(request.headers.get("last-event-id"))
        number = len(self.seen)
        news = f'id: {number}\nevent: progress\ndata: {{"fraction":0.1}}\n\n'
        if not self._breaks:
            news += f'id: {number}\nevent: state\ndata: {{"state":"?"}}\n\n'
        return httpx.Response(200, stream=Drops(news, breaks=self._breaks))


def test_waiting_ends_in_the_state_that_was_asked_for() -> None:
    service = Upgrades("pending", "running", "verifying", "completed")
    with client_of(service) as client:
        assert client.wait("01JD")["state"] == "completed"
    assert service.seen == [None, "1", "2"]


def test_a_broken_stream_is_taken_up_where_it_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forwardfill.client.RECONNECT_SECONDS", 0.0)
    service = Upgrades("running", "running", "paused", breaks=True)
    with client_of(service) as client:
        assert client.wait("01JD", until={"paused", "completed"})["state"] == "paused"
    assert service.seen == [None, "1"]


class StartsAgain:
    """Before a service that answers everything but the first question as one that is away, so many times."""

    def __init__(self, service: Handler, times: int, status: int | None) -> None:
        self._service, self._times, self._status = service, times, status
        self._asked = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self._asked += 1
        if not 1 < self._asked <= 1 + self._times:
            return self._service(request)
        if self._status is None:
            raise httpx.ConnectError("connection refused")
        return httpx.Response(self._status, json={"status": self._status, "code": "unavailable", "detail": "d"})


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("client.RECONNECT_SECONDS", "client.LOOK_SECONDS", "patience.AGAIN_SECONDS"):
        monkeypatch.setattr(f"forwardfill.{name}", 0.0)


AWAY = pytest.mark.parametrize("status", [None, 429, 502, 503, 504])


@AWAY
@pytest.mark.usefixtures("hurry")
def test_a_service_that_starts_again_is_waited_for_with_its_upgrade(status: int | None) -> None:
    with client_of(StartsAgain(Upgrades("running", "completed"), 4, status)) as client:
        assert client.wait("01JD", timeout=30.0)["state"] == "completed"


@AWAY
@pytest.mark.usefixtures("hurry")
def test_a_service_that_starts_again_is_waited_for_with_its_fit(status: int | None) -> None:
    ends = iter([None, "now", None])
    service = StartsAgain(lambda _: httpx.Response(200, json={"finished_at": next(ends)}), 3, status)
    with client_of(service) as client:
        assert [found["finished_at"] for found in client.watch_fit("01JF")] == [None, "now"]


@pytest.mark.usefixtures("hurry")
def test_a_service_that_stays_away_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    service = StartsAgain(Upgrades("running"), 10**9, None)
    with client_of(service) as client, pytest.raises(TimeoutError, match="does not answer"):
        client.wait("01JD", timeout=0.05)
    monkeypatch.setattr("forwardfill.patience.AWAY_SECONDS", 0.05)
    with client_of(StartsAgain(Upgrades("running"), 10**9, None)) as client, pytest.raises(httpx.ConnectError):
        client.wait("01JD")


def test_a_service_that_never_answered_is_not_waited_for() -> None:
    def away(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    with client_of(away) as client, pytest.raises(httpx.ConnectError):
        client.wait("01JD")


@pytest.mark.usefixtures("hurry")
def test_an_upgrade_that_is_gone_is_not_waited_for() -> None:
    gone = {"status": 404, "code": "upgrade_not_found", "detail": "no upgrade has the id"}
    service = iter([httpx.Response(200, json=upgrade("running")), *(httpx.Response(404, json=gone) for _ in range(2))])
    with client_of(lambda _: next(service)) as client, pytest.raises(ForwardfillError, match="upgrade_not_found"):
        client.wait("01JD")


def test_waiting_for_what_cannot_come_any_more_is_an_error() -> None:
    with client_of(Upgrades("running", "failed")) as client, pytest.raises(UpgradeStoppedError, match="failed"):
        client.wait("01JD")


def in_turn(*upgrades: dict[str, Any]) -> Handler:
    """An upgrade that is the next one each time it is asked for, and the last one from then on; its streams end at once."""
    left = list(upgrades)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            return httpx.Response(200, stream=Drops("event: state\ndata: {}\n\n"))
        return httpx.Response(200, json=left.pop(0) if len(left) > 1 else left[0])

    return answer


def test_a_pause_that_a_gate_made_is_not_waited_out_because_only_a_person_ends_it() -> None:
    paused = upgrade("paused", conditions=CLOSED)
    with client_of(in_turn(upgrade("running"), paused)) as client, pytest.raises(UpgradeStoppedError) as caught:
        client.wait("01JD", timeout=30.0)
    assert caught.value.upgrade == paused
    for condition in CLOSED:
        assert condition["detail"] in str(caught.value)


def test_a_pause_that_is_waited_for_is_found_whoever_made_it() -> None:
    for conditions in (CLOSED, ASKED_FOR):
        with client_of(in_turn(upgrade("paused", conditions=conditions))) as client:
            assert client.wait("01JD", until={"paused", "completed"})["conditions"] == conditions


def test_a_pause_that_somebody_asked_for_and_a_manual_cutover_are_waited_out() -> None:
    paused, waits = upgrade("paused", conditions=ASKED_FOR), upgrade("awaiting_cutover", conditions=CLOSED[1:])
    with client_of(in_turn(paused, upgrade("running"), waits, upgrade("completed"))) as client:
        assert client.wait("01JD", timeout=30.0)["state"] == "completed"


def test_waiting_has_a_limit() -> None:
    with client_of(Upgrades("running")) as client, pytest.raises(TimeoutError, match="running"):
        client.wait("01JD", timeout=0.0)


class Rests:
    """An upgrade that rests: its streams send comments, or nothing, and keep the read timeout that they were asked with."""

    def __init__(self, comments: Iterable[bytes] = ()) -> None:
        self._comments = comments
        self.timeouts: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json=upgrade("paused"))
        self.timeouts.append(request.extensions["timeout"]["read"])
        return httpx.Response(200, stream=Silence(self._comments))


class Silence(httpx.SyncByteStream):
    """Comments, and then nothing within the read timeout."""

    def __init__(self, comments: Iterable[bytes]) -> None:
        self._comments = comments

    def __iter__(self) -> Iterator[bytes]:
        yield from self._comments
        raise httpx.ReadTimeout("nothing came")


def comments() -> Iterator[bytes]:
    """Comments without an end, though no test should read them for seconds."""
    patience = time.monotonic() + 5.0
    while time.monotonic() < patience:
        yield b": still here\n\n"
    pytest.fail("was waited on for ever")


def test_comments_do_not_prolong_a_wait() -> None:
    with client_of(Rests(comments())) as client, pytest.raises(TimeoutError, match=r"is paused after 0\.05 s"):
        client.wait("01JD", timeout=0.05)


def test_no_stream_of_a_wait_is_silent_beyond_its_end() -> None:
    service = Rests()
    with client_of(service) as client, pytest.raises(TimeoutError, match="paused"):
        client.wait("01JD", timeout=0.05)
    assert max(service.timeouts) <= 0.05


def test_a_stream_whose_read_timeout_passes_the_end_of_the_wait_is_opened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forwardfill.client.SLACK_SECONDS", 0.01)
    service = Rests(comments())
    with client_of(service) as client, pytest.raises(TimeoutError, match="paused"):
        client.wait("01JD", timeout=0.05)
    assert service.timeouts[1] <= service.timeouts[0] - 0.01


@pytest.mark.parametrize("value", [Decimal(1), {1: 2}, {1, 2}, 2**64, "\ud800"], ids=["a", "b", "c", "d", "e"])
def test_what_json_cannot_say_is_refused_by_its_place_before_anything_is_sent(value: Any) -> None:
    recorder = Recorder({"version": 1})
    payloads = [{"price": 1}, {"price": [value]}]
    with client_of(recorder) as client:
        with pytest.raises(TypeError, match=r"^/payloads/1/price/0.*: "):
            client.upsert("g", "m", ids=["a", "b"], embeddings=np.eye(2), payloads=payloads, batch=1)
        with pytest.raises(TypeError, match=r"^/filter/price/in/0.*: "):
            client.search("g", "m", [1], filter={"price": {"in": [value]}})
    assert recorder.requests == []


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.float16])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_a_number_that_json_does_not_have_is_refused_by_its_place_and_nothing_is_sent(
    text: str, kind: Callable[[str], Any]
) -> None:
    number = kind(text)
    recorder = Recorder({})
    with client_of(recorder) as client:
        for place, call in {
            "/payloads/1/price": lambda: client.upsert(
                "g", "m", ids=["a", "b"], embeddings=[[1], [2]], payloads=[{"price": None}, {"price": number}]
            ),
            "/filter/price/in/0": lambda: client.search("g", "m", [1], filter={"price": {"in": [number]}}),
            "/throttle/items_per_second": lambda: client.start_upgrade(
                "g", transformation="t", throttle={"items_per_second": number}
            ),
            "/gate/min_cmc1": lambda: client.start_upgrade("g", transformation="t", gate={"min_cmc1": number}),
            "/filter/price/in/1": lambda: client.search("g", "m", [1], filter={"price": {"in": np.array([1, number])}}),
        }.items():
            with pytest.raises(ValueError, match=place):
                call()
        assert recorder.requests == []
        client.search("g", "m", [1], filter={"price": None, "name": "null"})
    assert recorder.bodies[0]["filter"] == {"price": None, "name": "null"}


def test_an_upgrade_can_be_started_at_a_service_that_is_older_than_the_client() -> None:
    recorder = Recorder({"id": "01JD"})
    with client_of(recorder) as client:
        client.start_upgrade("photos", target_model="new")
        client.start_upgrade("photos", target_model="new", on_contradicting_items="ignore")
    known = {"gallery", "target_model", "cutover", "order", "on_missing_side_information", "dry_run"}
    assert [body.keys() - known for body in recorder.bodies] == [set(), {"on_contradicting_items"}]


def test_numpys_numbers_are_sent_as_numbers() -> None:
    recorder = Recorder({"version": 1})
    with client_of(recorder) as client:
        client.register_model("m", dimension=np.int64(3), metric="cosine", normalized=np.True_)  # type: ignore[arg-type]
        client.search("g", "m", [1], k=np.int64(2), filter={"price": {"lt": np.float32(0.5)}})  # type: ignore[arg-type]
        client.upsert("g", "m", ids=["a"], embeddings=[[1]], payloads=[{"size": np.uint8(7), "box": np.arange(2)}])
    model, search, upsert = recorder.bodies
    assert (model["dimension"], model["normalized"]) == (3, True)
    assert (search["k"], search["filter"]) == (2, {"price": {"lt": 0.5}})
    assert upsert["items"][0]["payload"] == {"size": 7, "box": [0, 1]}
