"""Processes that are kept running: started again once they worked, given up if they never did."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path
from queue import SimpleQueue

import pytest

from forwardfill import processes
from forwardfill.processes import _Child, _kept, serve_together
from service.group import PortTakenError
from service.settings import ServiceSettings
from tests.acceptance.system import wait_for

UNKNOWN = 2  # with which the command line refuses a command that it does not have


def test_one_that_ends_before_it_ever_worked_is_told_and_not_started_again() -> None:
    ended: SimpleQueue[int] = SimpleQueue()
    with _kept([_Child("never", ["no-such-command"], works=lambda: False, failed=ended.put)]):
        assert ended.get(timeout=60) == UNKNOWN
    assert ended.empty()


def test_one_that_worked_is_started_again_whatever_it_ends_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_RESTART_SECONDS", 0.0)
    worked, started = tmp_path / "worked", list[str]()
    spawn = _Child._spawn

    def counted(self: _Child) -> subprocess.Popen[bytes]:
        started.append(self.name)
        worked.touch()
        return spawn(self)

    monkeypatch.setattr(_Child, "_spawn", counted)
    ended: SimpleQueue[int] = SimpleQueue()
    with _kept([_Child("again", ["no-such-command"], works=worked.exists, failed=ended.put)]):
        wait_for(lambda: len(started) >= 3, 60, lambda: f"started {len(started)} times")
    assert ended.empty()


def test_one_that_hangs_is_ended_but_not_before_its_first_sign_of_life_nor_after_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_Child, "_spawn", lambda _: subprocess.Popen(["sleep", "1000"]))
    reader, writer = processes._pipe()
    child = _Child("hangs", [], stop_seconds=0.0, alive=(reader, writer))
    with _kept([child]):
        wait_for(lambda: child._process is not None, 60, lambda: "it was not started")
        process = child._process
        assert process is not None
        os.write(writer, b".")  # of one that had the place before
        for _ in range(1000):
            child.look()
        for _ in range(100):
            os.write(writer, b".")
            for _ in range(processes._SILENT_LOOKS):
                child.look()
        assert process.poll() is None
        child.look()
        assert process.wait(60) == -signal.SIGKILL
        wait_for(lambda: child._process is not process, 60, lambda: "none was started in its place")


def test_one_is_out_of_reach_of_the_terminal_but_shares_the_processors_with_those_that_started_it() -> None:
    """A session of its own would have as large a share as the API's, however low its priority within it: sched(7), autogroup."""
    started = _Child("one", ["no-such-command"])._spawn()
    assert os.getpgid(started.pid) == started.pid, "Ctrl-C is for the foreground's process group"
    assert os.getsid(started.pid) == os.getsid(0)
    assert started.wait(60) == UNKNOWN


def test_one_that_cannot_be_started_for_lack_of_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_RESTART_SECONDS", 0.0)
    spawn, tries = _Child._spawn, list[str]()

    def short(self: _Child) -> subprocess.Popen[bytes]:
        tries.append(self.name)
        if len(tries) < 3:
            raise OSError(12, "Cannot allocate memory")
        return spawn(self)

    monkeypatch.setattr(_Child, "_spawn", short)
    ended: SimpleQueue[int] = SimpleQueue()
    with _kept([_Child("late", ["no-such-command"], works=lambda: False, failed=ended.put)]):
        assert ended.get(timeout=60) == UNKNOWN
    assert len(tries) == 3


def test_nothing_is_started_beside_api_processes_whose_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its handlers
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortTakenError):
        serve_together(ServiceSettings(port=taken.getsockname()[1], processes=2), beside=pytest.fail)
