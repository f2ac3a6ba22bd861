"""How upgrades are measured where there is a GPU; only the settings, since that takes one."""

from __future__ import annotations

import pytest

from benchmarks.upgrading import beside_a_gpu
from gallery.settings import GallerySettings


@pytest.mark.parametrize("cores", [1, 16, 224])
def test_a_worker_beside_a_gpu_takes_the_settings_whatever_the_number_of_cores(cores: int) -> None:
    assert GallerySettings(**beside_a_gpu(cores)).segments_at_once >= 2
