"""Messages as files: whole or not there, taken once."""

from __future__ import annotations

import threading
from pathlib import Path
from queue import Empty

import pytest
from kombu import Connection

from workers.app import create_app
from workers.settings import WorkerSettings


@pytest.fixture
def connection(tmp_path: Path) -> Connection:
    return create_app(WorkerSettings(broker_url=""), tmp_path).connection_for_write()


def test_messages_arrive_in_the_order_in_which_they_were_sent(connection: Connection) -> None:
    channel = connection.channel()
    for number in range(5):
        channel._put("q", {"number": number})
    assert [channel._get("q")["number"] for _ in range(5)] == list(range(5))
    with pytest.raises(Empty):
        channel._get("q")


def test_a_message_that_is_only_begun_is_not_seen_and_a_broken_one_is_dropped(
    connection: Connection, tmp_path: Path
) -> None:
    channel, folder = connection.channel(), tmp_path / "broker" / "messages"
    (folder / "q.0.begun.part").write_text('{"number":')
    (folder / "q.0.broken.msg").write_text("")
    channel._put("q", {"number": 7})
    assert channel._get("q") == {"number": 7}
    assert [path.name for path in folder.iterdir()] == ["q.0.begun.part"]


def test_each_message_reaches_one_of_several_readers(connection: Connection) -> None:
    sent, taken, lock = 200, [], threading.Lock()
    writer = connection.channel()
    for number in range(sent):
        writer._put("q", {"number": number})

    def read() -> None:
        channel = connection.channel()
        while True:
            try:
                message = channel._get("q")
            except Empty:
                return
            with lock:
                taken.append(message["number"])

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert sorted(taken) == list(range(sent))


def test_other_queues_messages_are_left_alone(connection: Connection) -> None:
    channel = connection.channel()
    channel._put("other", {})
    assert channel._size("q") == 0
    assert channel._size("other") == 1
    assert channel._purge("other") == 1
