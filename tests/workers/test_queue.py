"""Nudges, and a broker that does not take them."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import structlog
from kombu.exceptions import OperationalError

from tests.acceptance.system import wait_for
from workers import queue
from workers.app import WORK, create_app
from workers.settings import WorkerSettings


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


@contextmanager
def _tls_server(certificate: Path, key: Path) -> Iterator[tuple[int, list[bytes]]]:
    """The port of a server that nobody vouches for, and what clients send it first; it never answers."""
    context, heard = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), list[bytes]()
    context.load_cert_chain(certificate, key)

    def serve() -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                client, _ = listener.accept()
                with client, suppress(OSError), context.wrap_socket(client, server_side=True) as shaken:
                    heard.append(shaken.recv(4096))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1], heard
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("options", ["", "?ssl_ca_certs={certificate}"])
def test_a_redis_by_tls_hears_the_password_only_if_its_certificate_is_one_to_trust(
    options: str, tmp_path: Path
) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl on the PATH, which makes a certificate")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    with _tls_server(certificate, key) as (port, heard):
        url = f"rediss://:geheim@127.0.0.1:{port}/0{options.format(certificate=certificate)}"
        app = create_app(WorkerSettings(broker_url=url), tmp_path)
        with pytest.raises(OperationalError, match=None if options else "certificate verify failed"):
            app.send_task(WORK, retry=False, ignore_result=True)  # nobody answers
    assert any(b"geheim" in each for each in heard) == bool(options)
