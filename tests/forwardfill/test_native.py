"""Threads, and what they may keep for good (ADR 0031). In a process of its own, because native libraries ask only once."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forwardfill import data_folder
from gallery import folder
from gallery.files import Files

THREADS = 4 * (os.cpu_count() or 1)

#: does `work` in as many threads, all of which are there until the end, and prints what `measure` returns then
TOGETHER = """
import ctypes, threading
from forwardfill import native

native.prepare(1)
libc = ctypes.CDLL(None)

def together(threads, work, measure):
    done, over = threading.Barrier(threads + 1), threading.Event()

    def run():
        kept = work()
        done.wait()
        over.wait()

    for _ in range(threads):
        threading.Thread(target=run).start()
    done.wait()
    measure()
    over.set()
"""

TRANSFORM = """
import numpy as np
from models.runtime import Transform
from models.transformations import Fct, build

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc.mallinfo2.restype = Info

def given_out():
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd

transform = Transform(build(Fct(source_dimension=128, target_dimension=128, side_dimension=128, hidden=64)))
rows = np.ones((2000, 128), np.float32)
transform(rows[:1], rows[:1])
before = given_out()

def work():
    transform(rows, rows)

together({threads}, work, lambda: print(given_out() - before))
"""

ALLOCATE = """
libc.malloc.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
out = ctypes.c_void_p.in_dll(libc, "stdout")
together({threads}, lambda: libc.malloc(10_000), lambda: (libc.malloc_info(0, out), libc.fflush(None)))
"""

MULTIPLIERS = """
from forwardfill import cli, native
from threadpoolctl import threadpool_info

native.prepare(3)
import faiss
print(*{library["num_threads"] for library in threadpool_info()})
"""


PREPARED = """
import sys
from forwardfill import native

def prepare(threads):
    print(*({{"faiss", "torch"}} & sys.modules.keys()))
    sys.exit()

native.prepare = prepare
from forwardfill.cli import app
app({command})
"""


def said(program: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MKL_", "MALLOC_"))}
    command = [sys.executable, "-c", TOGETHER + program.format(threads=THREADS)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc tells what it has given out")
def test_a_thread_keeps_nothing_of_what_it_transformed() -> None:
    assert int(said(TRANSFORM)) < THREADS * 500_000


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="glibc tells of its arenas")
def test_threads_share_as_many_arenas_as_there_are_cores() -> None:
    assert 1 <= said(ALLOCATE).count("<heap nr=") <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("given", "used"), [({}, "3"), ({"OMP_NUM_THREADS": "2"}, "2")])
def test_all_that_multiply_use_as_many_threads_as_they_are_told_unless_the_environment_says_how_many(
    given: dict[str, str], used: str
) -> None:
    """NumPy too, which commands import before they know: its idle threads spin, for a tenth of a second after each product."""
    environment = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    command = [sys.executable, "-c", MULTIPLIERS]
    ran = subprocess.run(command, env={**environment, **given}, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [used]


@pytest.mark.parametrize("command", [["serve"], ["worker"], ["verify", "--repair"]])
def test_what_asks_only_once_is_not_imported_before_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("FORWARDFILL_DATA", str(tmp_path))
    catalog = data_folder.migrated_catalog()
    folder.claim(catalog, Files(tmp_path))
    catalog.close()
    program = [sys.executable, "-c", PREPARED.format(command=command)]
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout == "\n"
