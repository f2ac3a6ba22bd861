"""Each worker takes a GPU of its own, as long as there are enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from workers.devices import Claim, NoSuchDevice, chosen
from workers.settings import WorkerSettings

GPUS = ["a", "b", "c"]


def test_each_claim_gets_another_and_gives_it_back(tmp_path: Path) -> None:
    claims = [Claim(GPUS, tmp_path) for _ in GPUS]
    assert [claim.name for claim in claims] == GPUS
    claims[1].release()
    again = Claim(GPUS, tmp_path)
    assert (again.name, again.is_shared) == ("b", False)


def test_who_sees_only_some_of_them_under_other_numbers_takes_none_that_is_taken(tmp_path: Path) -> None:
    kept = Claim(GPUS[1:], tmp_path)
    assert (kept.name, Claim(GPUS[1:], tmp_path).name, Claim(GPUS, tmp_path).name) == ("b", "c", "a")


def test_where_all_are_taken_one_of_them_is_shared(tmp_path: Path) -> None:
    kept = [Claim(GPUS, tmp_path) for _ in GPUS]
    shared = Claim(GPUS, tmp_path)
    assert shared.is_shared
    assert shared.name in {claim.name for claim in kept}


def test_a_process_that_is_killed_lets_go_of_its_claim(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from workers.devices import Claim; "
        f"print(Claim(['a'], Path({str(tmp_path)!r})).is_shared, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"False\n"
        assert Claim(["a"], tmp_path).is_shared
        other.kill()
    assert not Claim(["a"], tmp_path).is_shared


def test_a_device_that_is_named_is_taken_as_it_is_and_claims_nothing(tmp_path: Path) -> None:
    named = ["cpu", *(f"cuda:{at}" for at in range(torch.cuda.device_count()))]
    assert [chosen(each, tmp_path) for each in named] == named
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_not_there_is_refused_with_what_would_help(tmp_path: Path) -> None:
    with pytest.raises(NoSuchDevice, match=r"cannot compute on 'cuda:99' \(.+\): .* FORWARDFILL_DEVICE=cpu"):
        chosen("cuda:99", tmp_path)


def test_a_gpu_that_cannot_be_used_is_refused_also_where_nobody_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the driver is older than what PyTorch was made for: NVML counts the GPU, and CUDA does not start."""

    def start(at: int) -> None:
        raise RuntimeError(f"The NVIDIA driver on your system is too old for GPU {at}\nmore of it")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", start)
    with pytest.raises(
        NoSuchDevice, match=r"cannot compute on 'auto' \(The NVIDIA .* GPU 0\): .* FORWARDFILL_DEVICE=cpu"
    ):
        chosen("auto", tmp_path)


@pytest.mark.parametrize("name", ["foo", "", "cuda:", "cuda:x", "cuda:-1", "cuda:01", "meta", "cpu "])
def test_a_name_that_no_device_has_is_refused_before_anything_starts(name: str) -> None:
    with pytest.raises(ValidationError, match="is not auto, cpu, cuda, or cuda:N"):
        WorkerSettings(device=name)


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_a_name_that_a_device_may_have_is_taken(name: str) -> None:
    assert WorkerSettings(device=name).device == name
