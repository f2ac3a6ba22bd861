"""The limits that a GPU is compared with. A CPU has the same ones, so that all of it runs without a GPU too."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ours
from benchmarks.limits import Limits, measured


def test_the_least_of_them_is_named() -> None:
    assert Limits(arithmetic=4, device_memory=3, host_copy=2, disk=5).least == ("host_copy", 2)


@pytest.mark.parametrize("computed_in", ["float32", "bfloat16"])
def test_each_is_measured_and_a_wider_network_is_allowed_fewer_items(tmp_path: Path, computed_in: str) -> None:
    narrow, wide = (ours.write_artifact(tmp_path / f"{hidden}", hidden) for hidden in (64, 4096))
    found = [
        measured(path, tmp_path, device="cpu", computed_in=computed_in, side=256, size=1 << 20)
        for path in (narrow, wide)
    ]
    assert all(rate > 0 for each in found for rate in each)
    assert found[1].arithmetic < found[0].arithmetic
    assert found[1].device_memory < found[0].device_memory
    assert list(tmp_path.glob("limit")) == []
