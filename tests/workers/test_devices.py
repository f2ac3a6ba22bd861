"""Each worker takes a GPU of its own, as long as there are enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from workers.devices import NoSuchDevice, chosen, claimed
from workers.settings import WorkerSettings

GPUS = ["a", "b", "c"]


def test_each_claim_gets_another(tmp_path: Path) -> None:
    assert [claimed(GPUS, tmp_path) for _ in GPUS] == GPUS


def test_who_sees_only_some_of_them_under_other_numbers_takes_none_that_is_taken(tmp_path: Path) -> None:
    assert [claimed(each, tmp_path) for each in (GPUS[1:], GPUS[1:], GPUS)] == ["b", "c", "a"]


def test_where_all_are_taken_one_of_them_is_shared(tmp_path: Path) -> None:
    taken = {claimed(GPUS, tmp_path) for _ in GPUS}
    assert claimed(GPUS, tmp_path) in taken


def test_a_process_that_is_killed_lets_go_of_its_claim(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from workers.devices import claimed; "
        f"print(claimed(['a', 'b'], Path({str(tmp_path)!r})), flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"a\n"
        assert claimed(["a", "b"], tmp_path) == "b"
        other.kill()
    assert claimed(["a", "b"], tmp_path) == "a"


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

    def start() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore of it")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", start)
    with pytest.raises(
        NoSuchDevice, match=r"cannot compute on 'auto' \(The NVIDIA .* too old\): .* FORWARDFILL_DEVICE=cpu"
    ):
        chosen("auto", tmp_path)


def test_of_more_gpus_than_cuda_gives_one_that_it_gives_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where one GPU is divided (MIG), of which CUDA gives one part, and nothing else. Until it starts, NVML counts."""
    started = list[bool]()

    def properties(at: int) -> SimpleNamespace:
        if at:
            raise AssertionError("Invalid device id")
        return SimpleNamespace(uuid="part")

    monkeypatch.setattr(torch.cuda, "init", lambda: started.append(True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 if started else 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))
    assert chosen("auto", tmp_path) == "cuda:0"


@pytest.mark.parametrize("name", ["foo", "", "cuda:", "cuda:x", "cuda:-1", "cuda:01", "meta", "cpu "])
def test_a_name_that_no_device_has_is_refused_before_anything_starts(name: str) -> None:
    with pytest.raises(ValidationError, match="is not auto, cpu, cuda, or cuda:N"):
        WorkerSettings(device=name)


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_a_name_that_a_device_may_have_is_taken(name: str) -> None:
    assert WorkerSettings(device=name).device == name
