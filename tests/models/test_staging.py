"""Blocks on their way to a device and back. What needs a GPU is marked, and skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import torch

from models import staging
from models.runtime import Transform
from models.staging import Block, staged
from models.transformations import Fct, Identity, build

CPU = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=[pytest.mark.gpu, GPU])]


def blocks(sizes: list[int], width: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(rng.random((rows, width), np.float32), rng.random((rows, 3), np.float32)) for rows in sizes]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_results_come_in_the_order_of_the_blocks_whatever_their_sizes(device: torch.device) -> None:
    given = blocks([5, 5, 8, 1, 0, 5, 2, 9])
    made = list(staged(given, lambda embeddings, side: embeddings[:, :3] + 2 * side, device))
    assert [len(block) for block in made] == [5, 5, 8, 1, 0, 5, 2, 9]
    for (embeddings, side), result in zip(given, made, strict=True):
        np.testing.assert_allclose(result, embeddings[:, :3] + 2 * side, rtol=1e-6)
        assert result.dtype == np.float32


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_result_is_the_callers_own_although_nothing_was_computed(device: torch.device) -> None:
    """The identity gives back what it was given: on a CPU, the memory that the next block would be copied to."""
    transform = Transform(build(Identity(source_dimension=6, target_dimension=6)), device=device)
    given = blocks([4, 4, 4, 4, 4])
    made = list(transform.each([(embeddings, None) for embeddings, _ in given]))
    for (embeddings, _), result in zip(given, made, strict=True):
        np.testing.assert_array_equal(result, embeddings)
        assert not np.shares_memory(result, embeddings)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_few_blocks_are_under_way_and_no_more(device: torch.device) -> None:
    taken: list[int] = []

    def given() -> Iterator[Block]:
        for number, block in enumerate(blocks([2] * 9)):
            taken.append(number)
            yield block

    for number, _ in enumerate(staged(given(), lambda embeddings, side: embeddings, device)):
        assert len(taken) <= number + 3
    assert len(taken) == 9


def test_what_goes_wrong_with_one_block_is_raised_after_the_results_before_it() -> None:
    transform = Transform(build(Fct(source_dimension=6, target_dimension=4, side_dimension=3, hidden=8)))
    made = transform.each([*blocks([3]), *blocks([3], width=5)])
    assert next(made).shape == (3, 4)
    with pytest.raises(ValueError, match=r"embeddings must have shape \(n, 6\), not \(3, 5\)"):
        next(made)


def test_a_gpu_has_as_many_streams_as_stages_however_often_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has 32, hands them out in turn, and gives no memory of one to another."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Stream", made.append)
    staging._stream.cache_clear()
    for _ in range(20):
        assert list(staged([], lambda embeddings, side: embeddings, torch.device("cuda:7"))) == []
    staging._stream.cache_clear()
    assert made == [torch.device("cuda:7")] * 3


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_columns_that_are_computed_at_once_get_what_each_gets_alone(device: torch.device) -> None:
    transform = Transform(
        build(Fct(source_dimension=6, target_dimension=4, side_dimension=3, hidden=64)), device=device
    )
    columns = [[(embeddings + lane, side) for embeddings, side in blocks([50, 50, 50, 50, 9])] for lane in range(4)]
    alone = [list(transform.each(column)) for column in columns]
    with ThreadPoolExecutor(len(columns)) as lanes:
        for made, expected in zip(lanes.map(lambda column: list(transform.each(column)), columns), alone, strict=True):
            for one, other in zip(made, expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.fixture
def roughly() -> Iterator[None]:
    """TensorFloat-32, as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE asks for it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_float32_is_computed_as_such_on_a_gpu_though_the_environment_asks_for_rougher_numbers(roughly: None) -> None:
    """A lineage that says float32 would not be true, nor the error that a trial of bfloat16 finds."""
    with suppress(AssertionError, RuntimeError):  # where there is no GPU
        Transform(build(Identity(source_dimension=6, target_dimension=6)), device="cuda")
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.gpu
@GPU
def test_a_gpu_computes_what_a_cpu_computes(roughly: None) -> None:
    torch.manual_seed(0)
    module = build(Fct(source_dimension=6, target_dimension=4, side_dimension=3, hidden=64))
    on_cpu, on_gpu = Transform(module), Transform(module, device="cuda")
    given = blocks([100, 100, 100, 7, 100, 100])
    for one, other in zip(on_cpu.each(given), on_gpu.each(given), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
