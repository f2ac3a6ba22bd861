"""Nudges, and a broker that does not take them."""

from __future__ import annotations

import threading
from typing import Any

import structlog
from kombu.exceptions import OperationalError

from tests.acceptance.system import wait_for
from workers import queue


class Broker:
    """What of a Celery app sends, until it is told to answer not at all."""

    def __init__(self) -> None:
        self.sent = 0
        self.answers = threading.Event()

    def send_task(self, *_: Any, **__: Any) -> None:
        self.sent += 1
        self.answers.wait(20)


class Away:
    def __init__(self) -> None:
        self.asked = 0

    def send_task(self, *_: Any, **__: Any) -> None:
        self.asked += 1
        raise OperationalError("connection refused") if self.asked == 1 else KeyError("what nobody foresaw")


def test_nobody_waits_for_a_broker_that_hangs_and_what_was_said_meanwhile_is_said_once() -> None:
    broker = Broker()
    nudges = queue.Queue(broker)  # type: ignore[arg-type]
    nudges.nudge()
    wait_for(lambda: broker.sent, 20, lambda: "nothing is sent")
    for _ in range(100):
        nudges.nudge()
    assert broker.sent == 1
    broker.answers.set()
    wait_for(lambda: broker.sent == 2, 20, lambda: f"{broker.sent} were sent")


def test_a_nudge_that_is_lost_keeps_no_other_from_being_sent() -> None:
    broker = Away()
    with structlog.testing.capture_logs() as events:
        nudges = queue.Queue(broker)  # type: ignore[arg-type]
        for times in (1, 2):
            nudges.nudge()
            wait_for(lambda times=times: len(events) == times, 20, lambda: str(events))
    assert [each["event"] for each in events] == ["nudge_lost"] * 2
