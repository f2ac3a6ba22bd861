"""Whatever is trained on a CPU is trained on another device too: no tensor is left behind."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from models.method import Method
from models.methods import METHODS
from tests.models.elsewhere import trained


@pytest.mark.slow
def test_every_method_is_trained_on_another_device_as_on_the_cpu() -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.models.elsewhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == dict.fromkeys(METHODS, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_is_trained_on_a_gpu(method: type[Method]) -> None:
    assert all(bool(each.isfinite().all()) for each in trained(method, "cuda"))
