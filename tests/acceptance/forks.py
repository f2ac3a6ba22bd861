"""Processes of the service that start in a moment: forked from one that has imported everything, and otherwise like any.

Each is a process of its own with its own environment, output and end; what it does not do again is to import PyTorch and
FAISS, which costs seconds and is not what is tested. Whoever forks has one thread, and nothing of the service runs in it.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

ROOT = Path(__file__).resolve().parents[2]


class Forked:
    """A forked process, as `tests.acceptance.system` knows processes."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery
        self._ended = os.pidfd_open(pid)
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def send_signal(self, sig: int) -> None:
        with self._lock:
            if self.returncode is None:  # until it is asked for its end, nobody else can have its number
                os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _look(self, timeout: float | None) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
                self.returncode = self._nursery.order({"ended": self.pid})
                os.close(self._ended)
            return self.returncode


class Nursery:
    """The process that forks, for as long as a `with` block runs."""

    def __enter__(self) -> Self:
        self._lock = threading.Lock()
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.acceptance.forks"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What still runs is killed."""
        self._popen.communicate()

    def spawn(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Forked:
        """Start `forwardfill`."""
        log.touch()
        order = {"arguments": list(arguments), "environment": dict(environment), "log": str(log.absolute())}
        return Forked(self, self.order(order))

    def order(self, what: Mapping[str, Any]) -> int:
        """One order, one number."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        with self._lock:
            print(json.dumps(what), file=self._popen.stdin, flush=True)
            return int(self._popen.stdout.readline())


def _serve() -> None:
    for module in ("forwardfill.cli", "models.fitting", "models.runtime", "service.main", "workers.main"):
        importlib.import_module(module)  # here, so that no child has to
    living = set()
    for line in sys.stdin:
        what = json.loads(line)
        if "ended" in what:
            living.discard(what["ended"])
            _say(os.waitstatus_to_exitcode(os.waitpid(what["ended"], 0)[1]))
            continue
        pid = os.fork()
        if pid == 0:
            _become(**what)
        living.add(pid)
        _say(pid)
    for pid in living:
        os.kill(pid, signal.SIGKILL)


def _say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def _become(arguments: list[str], environment: Mapping[str, str], log: str) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        out, nothing = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), os.open(os.devnull, os.O_RDONLY)
        for here, there in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(here, there)
        from forwardfill.cli import app

        app(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - its log must say why it ended
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
