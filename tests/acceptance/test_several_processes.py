"""Several API processes behind one port look like one to their clients, and go on when one of them is killed."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest

from forwardfill.client import Client, ForwardfillError
from forwardfill.local_service import free_port
from tests.acceptance.system import Api, Process, System, children, command, running, wait_for

GALLERY, MODEL, DIMENSION = "photos", "old", 8
PROCESSES = 2
CLIENTS = 8
QUERY = np.ones(DIMENSION, np.float32)


class Group:
    """A service of several processes, its clients, and each client's own connection."""

    def __init__(self, system: System, stack: ExitStack) -> None:
        self.api: Api = system.add_api("--processes", str(PROCESSES))
        self.url = str(self.api.http.base_url)
        #: how many searches were answered
        self.searched = 0
        wait_for(lambda: len(self.connected()) == PROCESSES, 60, lambda: "one of the processes does not listen")
        self.clients = [stack.enter_context(Client(self.url)) for _ in range(CLIENTS)]
        self.clients[0].register_model(MODEL, dimension=DIMENSION, metric="euclidean")
        self.clients[0].create_gallery(GALLERY, MODEL)

    def member(self, place: int) -> int | None:
        """The process of a place, if it runs."""
        wanted = f"--place\0{place}\0"
        return next((pid for pid in children(self.api.popen.pid) if wanted in command(pid)), None)

    def connected(self) -> set[str]:
        """Which processes answer, as the kernel deals out new connections: each names its requests after itself."""
        answers = [httpx.get(f"{self.url}/health/live") for _ in range(4 * CLIENTS)]
        return {answer.headers["x-request-id"].partition("-")[0] for answer in answers}

    def answered(self) -> int:
        """Searches that were answered, as whichever process is asked has it."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(
            int(float(each)) for each in re.findall(r'forwardfill_searches_total\{outcome="answered"\} (.*)', text)
        )

    def found(self, client: Client, gallery: str = GALLERY) -> list[str]:
        hits = client.search(gallery, MODEL, QUERY, k=100)["hits"]
        self.searched += 1
        return [hit["id"] for hit in hits]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with running(System(tmp_path_factory.mktemp("group"))) as system, ExitStack() as stack:
        yield Group(system, stack)


def test_what_one_connection_wrote_every_other_finds_at_once(group: Group) -> None:
    expected: set[str] = set()
    for turn in range(40):
        writer = group.clients[turn % CLIENTS]
        if turn % 4 == 3:
            gone = sorted(expected)[0]
            writer.delete_items(GALLERY, [gone])
            expected.discard(gone)
        else:
            writer.upsert(GALLERY, MODEL, ids=[f"item-{turn}"], embeddings=[QUERY])
            expected.add(f"item-{turn}")
        for client in group.clients:
            assert set(group.found(client)) == expected, turn


def test_a_gallery_is_there_for_everyone_once_it_is_made_and_gone_once_it_is_deleted(group: Group) -> None:
    for turn in range(10):
        group.clients[turn % CLIENTS].create_gallery("short-lived", MODEL)
        for client in group.clients:
            assert group.found(client, "short-lived") == []
        group.clients[(turn + 3) % CLIENTS].delete_gallery("short-lived")
        for client in group.clients:
            with pytest.raises(ForwardfillError, match="gallery_not_found"):
                group.found(client, "short-lived")


def test_metrics_are_those_of_all_and_never_fall(group: Group) -> None:
    for client in group.clients:
        group.found(client)
    wait_for(lambda: group.answered() == group.searched, 10, lambda: f"{group.answered()} of {group.searched} counted")
    last = group.searched
    for turn in range(100):
        now = group.answered()
        assert now >= last
        last = now
        group.found(group.clients[(turn + 1) % CLIENTS])


def test_one_that_is_killed_is_started_again_and_nothing_is_lost(group: Group) -> None:
    group.clients[0].upsert(GALLERY, MODEL, ids=["kept"], embeddings=[QUERY])
    group.found(group.clients[0])
    counted = group.answered()
    killed = group.member(0)
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: not alive(killed), 10, lambda: "it does not die")
    # The other answers whoever connects now.
    with Client(group.url) as client:
        assert "kept" in group.found(client)
        client.upsert(GALLERY, MODEL, ids=["written-meanwhile"], embeddings=[QUERY])
    wait_for(lambda: group.member(0), 10, lambda: "it is not started again")
    wait_for(lambda: len(group.connected()) == PROCESSES, 60, lambda: "the new one does not listen")
    for _ in range(CLIENTS):
        with Client(group.url) as client:
            assert {"kept", "written-meanwhile"} <= set(group.found(client))
    assert group.answered() >= counted  # each had shared its counts for that answer, or a second after them


def test_one_that_hangs_is_ended_and_another_answers_in_its_place(group: Group) -> None:
    hangs = group.member(1)
    assert hangs is not None
    os.kill(hangs, signal.SIGSTOP)
    wait_for(lambda: group.member(1) not in (None, hangs), 120, lambda: "it is not replaced")
    wait_for(lambda: len(group.connected()) == PROCESSES, 60, lambda: "the new one does not listen")
    assert '"process_hung"' in group.api.log.read_text()


def test_a_taken_port_is_refused_and_not_shared(group: Group, tmp_path: Path) -> None:
    second = serve(tmp_path, "--port", str(group.api.port), "--processes", "2")
    assert second.popen.wait(timeout=60) == 2
    assert f"cannot listen on 127.0.0.1:{group.api.port}" in second.log.read_text().replace("\n", "")


def test_an_open_address_without_a_key_is_refused_before_any_is_started(tmp_path: Path) -> None:
    process = serve(tmp_path, "--port", str(free_port()), "--host", "0.0.0.0", "--processes", "2")
    assert process.popen.wait(timeout=60) == 2
    assert "forwardfill keys create" in process.log.read_text()


def test_they_end_with_the_one_that_started_them_even_if_that_is_killed(tmp_path: Path) -> None:
    with running(System(tmp_path)) as system:
        api = system.add_api("--processes", "2", "--no-worker")
        started = children(api.popen.pid)
        assert len(started) == 2
        api.kill()
        ended(started, api.port)


def test_all_of_them_end_in_good_order(group: Group) -> None:
    started = children(group.api.popen.pid)
    assert len(started) == PROCESSES + 1  # and the worker
    assert group.api.stop() == 0
    ended(started, group.api.port)


def ended(started: list[int], port: int) -> None:
    wait_for(lambda: not any(alive(pid) for pid in started), 30, lambda: f"of {started} one goes on")
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass


def alive(pid: int) -> bool:
    """Whether it has not let go of everything: its connections go with the last of its threads, its number after that."""
    try:
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        return threads > 1 or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def serve(folder: Path, *options: str) -> Process:
    environment = {"FORWARDFILL_DATA": str(folder / "data")}
    return Process(["serve", "--no-worker", *options], environment, folder / "log")
