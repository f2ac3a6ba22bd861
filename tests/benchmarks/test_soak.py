"""How the soak judges memory. That it runs is for `make soak`: it takes minutes."""

from __future__ import annotations

import json

from benchmarks.soak import memory
from benchmarks.table import Group, document


def test_memory_that_swings_around_a_level_is_level() -> None:
    samples = [(60.0 + 2 * at, 300_000_000 + (10_000_000 if at % 10 < 5 else 0)) for at in range(250)]
    line = memory(samples)
    assert not line.missed
    assert abs(line.ratio - 1) < 0.01


def test_memory_that_leaks_a_little_in_every_minute_is_found_with_its_slope() -> None:
    samples = [(60.0 + 2 * at, 300_000_000 + at * 200_000) for at in range(250)]
    line = memory(samples)
    assert line.missed
    assert "+6.00 MB a minute" in line.note
    assert json.dumps(document([Group("soak", (line,))]), allow_nan=False)
