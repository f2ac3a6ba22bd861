"""What the client takes for vectors, ids, labels and payloads, and what it refuses before anything is sent."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from forwardfill.client import Client
from forwardfill.pairs import from_files, stream
from forwardfill.wire import encoded
from tests.forwardfill.answering import Recorder, client_of

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


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda client: client.search("photos", "old", ONE), r"vector: one vector has shape \(d,\), not \(1, 3\)"),
        (lambda client: client.explain("photos", "old", ONE), r"vector: one vector has shape \(d,\), not \(1, 3\)"),
        (
            lambda client: client.search("photos", "new", ONE[0], companions={"old": ONE}),
            r"companions of old: one vector has shape \(d,\), not \(1, 3\)",
        ),
    ],
)
def test_several_vectors_are_no_query_and_nothing_is_sent(call: Callable[[Client], object], says: str) -> None:
    service = Recorder({"hits": []})
    with client_of(service) as client, pytest.raises(ValueError, match=f"^{says}"):
        call(client)
    assert service.requests == []


def test_one_text_is_no_list_of_what_to_include() -> None:
    service = Recorder({"hits": []})
    with client_of(service) as client, pytest.raises(TypeError, match=r"^include: 'payload' is one, not several"):
        client.search("photos", "old", ONE[0], include="payload")
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


@pytest.mark.parametrize("kind", ["i1", "u8", ">f8", "f2", "g"])
def test_real_numbers_of_any_type_are_vectors(kind: Any) -> None:
    assert encoded(np.array([1, 2], kind)) == encoded([1.0, 2.0])


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
