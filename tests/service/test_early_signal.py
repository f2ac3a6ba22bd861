"""A signal that comes when the process is about to serve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
