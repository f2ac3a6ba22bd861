"""Memory that was freed is given back."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from benchmarks.processes import private
from workers import memory


@pytest.mark.skipif(memory._trim is None, reason="this C library cannot be asked to give memory back")
def test_what_a_thread_has_freed_is_given_back_although_something_lies_above_it() -> None:
    kept = []

    def work() -> None:
        freed = [np.ones(12_000) for _ in range(1000)]  # 96 MB, each too small to be mapped by itself
        kept.append(np.ones(12_000))
        del freed

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before = private(os.getpid())
    memory.give_back()
    assert private(os.getpid()) < before - 50_000_000
