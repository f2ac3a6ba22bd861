"""Signals that come at a moment that is easily forgotten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.service.served import PATIENCE_SECONDS, served

SIGNALLED = """
import os, signal
from service import server

share = server._share_the_interpreter

def signalled():
    share()
    os.kill(os.getpid(), signal.SIGTERM)

server._share_the_interpreter = signalled
from forwardfill.cli import app
app(["serve", "--no-worker", "--port", "0"])
"""


def test_a_signal_that_comes_before_the_server_listens_to_it_ends_the_process_in_good_order(tmp_path: Path) -> None:
    environment = {**os.environ, "FORWARDFILL_DATA": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", SIGNALLED], env=environment, timeout=60, check=False)
    assert ran.returncode == 0


#: the service, to which another signal comes at each line of what takes the first
SIGNALLED_AGAIN = """
import signal, sys
from service import server
from service.main import run

take, taking = server._Server.handle_exit, []

def again(frame, event, argument):
    signal.raise_signal(signal.SIGTERM)
    return again

def taken_with_others(self, number, frame):
    if taking:
        return take(self, number, frame)
    taking.append(number)
    sys.settrace(again)
    take(self, number, frame)
    sys.settrace(None)

server._Server.handle_exit = taken_with_others
run()
"""


def test_a_signal_that_comes_while_another_is_taken_keeps_no_process_from_its_end(tmp_path: Path) -> None:
    with served(SIGNALLED_AGAIN, tmp_path) as service:
        service.wait_ready()
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(PATIENCE_SECONDS) == 0
