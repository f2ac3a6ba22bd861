"""How upgrades are measured where there is a GPU; only the settings, since that takes one."""

from __future__ import annotations

import os
from importlib import reload

import pytest

from benchmarks import upgrading
from gallery.settings import GallerySettings


@pytest.mark.parametrize("cores", [1, 16, 224])
def test_a_worker_beside_a_gpu_takes_the_settings_whatever_the_number_of_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert GallerySettings(**reload(upgrading).ON_GPU).segments_at_once >= 2
