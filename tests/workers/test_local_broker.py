"""Messages as files: whole or not there, taken once."""

from __future__ import annotations

import threading
from pathlib import Path
from queue import Empty

import pytest
from celery.worker import state
from kombu import Connection, Exchange, Queue

from workers.app import create_app
from workers.local_broker import MOST_WAITING
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
    taken, lock = list[int](), threading.Lock()
    writer = connection.channel()

    def read() -> None:
        channel = connection.channel()
        while True:
            try:
                message = channel._get("q")
            except Empty:
                return
            with lock:
                taken.append(message["number"])

    for _ in range(6):
        taken.clear()
        for number in range(MOST_WAITING):
            writer._put("q", {"number": number})
        readers = [threading.Thread(target=read) for _ in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert sorted(taken) == list(range(MOST_WAITING))


def test_other_queues_messages_are_left_alone(connection: Connection) -> None:
    channel = connection.channel()
    channel._put("other", {})
    assert channel._size("q") == 0
    assert channel._size("other") == 1
    assert channel._purge("other") == 1


def test_of_many_messages_the_newest_wait_for_a_worker_that_comes_late(connection: Connection) -> None:
    channel = connection.channel()
    for number in range(MOST_WAITING + 10):
        channel._put("q", {"number": number})
    assert channel._size("q") == MOST_WAITING
    assert channel._get("q") == {"number": 10}


def test_who_waits_for_a_message_waits_no_longer_once_the_worker_is_told_to_stop(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = connection.Consumer([Queue("q", Exchange(""), routing_key="q")], callbacks=[lambda *_: None])
    with consumer:
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.01)
        monkeypatch.setattr("celery.worker.state.should_stop", None)
        threading.Timer(0.1, setattr, (state, "should_stop", 0)).start()
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=3600)
