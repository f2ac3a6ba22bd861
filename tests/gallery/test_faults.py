"""Faults come at the named point, at the named time, and only where the process was told of them when it started."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gallery import faults
from gallery.catalog.tables import now

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("gallery", "service", "workers") for path in (ROOT / folder).rglob("*.py")]


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.arm(None)


def test_a_process_that_was_told_of_no_fault_passes_every_point() -> None:
    faults.arm("")
    passed = 0
    for point in faults.POINTS:
        faults.reached(point)
        passed += 1
    assert passed == len(faults.POINTS) > 20  # none raised, and none ended this process


def test_a_full_disk_stays_full() -> None:
    faults.arm("sync:full:2")
    faults.reached("sync")
    faults.reached("rename")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as raised:
            faults.reached("sync")
        assert raised.value.errno == errno.ENOSPC


def test_a_kill_comes_at_the_named_time_and_nothing_runs_after_it() -> None:
    code = "from gallery import faults; faults.arm('publish:kill:3')\nfor n in range(9): print(n); faults.reached('publish')"
    died = subprocess.run([sys.executable, "-uc", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (died.returncode, died.stdout.split(), died.stderr) == (-signal.SIGKILL, ["0", "1", "2"], "")


def test_a_clock_that_is_set_back_is_the_one_that_leases_go_by() -> None:
    faults.arm("clock:-3600")
    assert 3590 < (datetime.now(UTC) - now()).total_seconds() < 3660
    faults.arm(None)
    assert (datetime.now(UTC) - now()).total_seconds() < 60


@pytest.mark.parametrize("fault", ["nowhere:kill:1", "publish:explode:1", "publish:kill", "publish", "publish:kill:x"])
def test_a_fault_that_could_never_come_is_refused(fault: str) -> None:
    with pytest.raises(ValueError, match=r"explode|no `point|invalid literal"):
        faults.arm(fault)


def test_every_point_is_in_the_code_and_the_code_has_no_other() -> None:
    text = "\n".join(path.read_text() for path in SOURCES)
    reached = set(re.findall(r'faults\.reached\("(\w+)"\)', text))
    named = set(re.findall(r'\.transaction\("(\w+)"\)', text)) | {"cancel", "rollback"}  # by the verb's own name
    assert named == set(faults.TRANSACTIONS)
    assert reached | named | {f"{name}.committed" for name in named} == faults.POINTS


def test_only_the_composition_roots_arm() -> None:
    arming = {path.relative_to(ROOT).as_posix() for path in SOURCES if "faults.arm(" in path.read_text()}
    assert arming == {"service/main.py", "workers/main.py"}
