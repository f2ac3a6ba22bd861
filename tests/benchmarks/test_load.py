"""The load generator against a real server: the bare endpoint that it is made for."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest

from benchmarks import hnsw, load
from benchmarks.processes import Server, private, resident, server
from benchmarks.vectors import Data, K, clustered, nearest, recall


@pytest.fixture(scope="module")
def data() -> Data:
    return clustered(500)._replace(queries=clustered(500).queries[:20])


@pytest.fixture(scope="module")
def bare(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bare")
    hnsw.save(hnsw.build(data), 200, folder / "index")
    with server(
        lambda port: [sys.executable, "-m", "benchmarks.bare", str(folder / "index"), str(port)],
        "/ready",
        folder / "bare.log",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def requests(data: Data) -> list[bytes]:
    bodies = ({"vector": base64.b64encode(query.tobytes()).decode(), "k": K} for query in data.queries)
    return [load.post("/search", orjson.dumps(body)) for body in bodies]


def ids(answers: list[load.Answer]) -> list[list[str]]:
    return [[hit["id"] for hit in orjson.loads(answer.body)["hits"]] for answer in answers]


def test_one_client_gets_the_answer_to_each_request_in_its_turn(
    bare: Server, requests: list[bytes], data: Data
) -> None:
    done = load.one_by_one(bare.port, requests, 40).checked()
    found = ids(done.answers)
    assert found[:20] == found[20:]
    assert recall(found[:20], nearest(data)) == 1.0


def test_many_connections_share_the_requests_and_each_is_answered_once(bare: Server, requests: list[bytes]) -> None:
    alone = {tuple(each) for each in ids(load.one_by_one(bare.port, requests, 20).answers)}
    done = load.together(bare.port, requests, connections=8, count=60).checked()
    found = [tuple(each) for each in ids(done.answers)]
    assert len(found) == 60
    assert set(found) == alone
    assert all(found.count(each) == 3 for each in alone)


def test_paced_requests_are_counted_from_when_they_were_due(bare: Server, requests: list[bytes]) -> None:
    due = 30

    def go_on(_: float) -> bool:
        nonlocal due
        due -= 1
        return due >= 0

    # One connection, and all are due at once: the last must be charged for waiting for all of the others.
    done = load.paced(bare.port, requests, connections=1, rate=1e9, while_=go_on).checked()
    seconds = [answer.seconds for answer in done.answers]
    assert len(seconds) == 30
    assert seconds == sorted(seconds)


def test_an_answer_that_is_an_error_is_counted_and_refused_as_a_measure(bare: Server) -> None:
    done = load.one_by_one(bare.port, [load.post("/nowhere", b"{}")], 3)
    assert done.failed == 3
    with pytest.raises(RuntimeError, match=r"3 of 3 requests failed.*404"):
        done.checked()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "raise SystemExit('no such index')"]
    with (
        pytest.raises(RuntimeError, match="ended with code 1: no such index"),
        server(lambda _: words, "/", tmp_path / "log"),
    ):
        pass


def test_what_a_process_wrote_is_a_part_of_what_it_holds(bare: Server) -> None:
    assert 0 < private(bare.pid) <= resident(bare.pid)


@pytest.mark.parametrize("cut", [5, 30, -1])
def test_an_answer_is_whole_only_with_its_last_byte(cut: int) -> None:
    answer = b'HTTP/1.1 201 Created\r\nContent-Length: 7\r\n\r\n{"a":1}'
    assert load.parsed(answer) == (201, b'{"a":1}')
    assert load.parsed(answer[:cut]) is None


def test_an_answer_without_a_length_is_no_measure() -> None:
    with pytest.raises(ValueError, match="without a length"):
        load.parsed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")


def test_the_least_effort_that_finds_enough_is_taken() -> None:
    truth = np.arange(100).reshape(10, 10)

    def ask(effort: int) -> list[list[str]]:
        return [[str(row) if row % 10 < effort // 4 else "0" for row in rows] for rows in truth.tolist()]

    effort, found = hnsw.least_effort(ask, truth, 0.8)
    assert effort // 4 >= 8
    assert found >= 0.8
    assert hnsw.EFFORTS[hnsw.EFFORTS.index(effort) - 1] // 4 < 8
