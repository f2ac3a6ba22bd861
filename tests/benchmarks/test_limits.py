"""The limits that a GPU is compared with. A CPU has the same ones, so that all of it runs without a GPU too."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ours
from benchmarks.limits import Limits, Rates, allowed, rates
from benchmarks.vectors import DIMENSION

RATES = Rates(operations=1e12, copied=1e10, sent=1e9, fetched=1e9, written=1e8)


def test_the_least_of_them_is_named() -> None:
    assert Limits(arithmetic=4, device_memory=3, host_copy=2, disk=5).least == ("host_copy", 2)


@pytest.mark.parametrize("computed_in", ["float32", "bfloat16"])
def test_every_rate_of_a_machine_is_measured_and_nothing_is_left_behind(tmp_path: Path, computed_in: str) -> None:
    assert all(rate > 0 for rate in rates(tmp_path, device="cpu", computed_in=computed_in, side=256, size=1 << 20))
    assert list(tmp_path.iterdir()) == []


def test_a_machine_allows_a_wider_network_fewer_items_and_half_the_bytes_twice_as_many(tmp_path: Path) -> None:
    narrow, wide = (ours.write_artifact(tmp_path / f"{hidden}", hidden) for hidden in (64, 4096))
    some, other = allowed(narrow, RATES, "float32"), allowed(wide, RATES, "float32")
    assert other.arithmetic < some.arithmetic
    assert other.device_memory < some.device_memory
    assert (other.host_copy, other.disk) == (some.host_copy, some.disk)
    assert allowed(wide, RATES, "bfloat16").device_memory == 2 * other.device_memory


def test_vectors_in_and_out_share_no_way_so_that_the_slower_decides(tmp_path: Path) -> None:
    artifact = ours.write_artifact(tmp_path / "artifact", 64)
    read, written = (DIMENSION + DIMENSION) * 4, DIMENSION * 4
    assert allowed(artifact, RATES._replace(sent=1e6), "float32").host_copy == pytest.approx(1e6 / read)
    assert allowed(artifact, RATES._replace(fetched=1e5), "float32").host_copy == pytest.approx(1e5 / written)
