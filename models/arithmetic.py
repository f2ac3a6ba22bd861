"""In which number type a transformation is computed: bfloat16 where that is faster and near enough, else float32.

Both are measured. A processor without instructions for bfloat16 computes it four times slower than float32, one with
them several times faster; and how far the result is from that of float32 depends on the weights and on the vectors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from models.staging import Floats

NumberType = Literal["float32", "bfloat16"]

#: the fewest rows to decide by
FEWEST_ROWS = 64
#: the most rows to decide by: with more rows the decision would be the same
SAMPLE_ROWS = 1024
_ROUNDS = 3
# bfloat16 must be so many times as fast: a gain of a few percent may be chance, and is not worth the rounding.
_FASTER = 1.1
# From so many times as fast on, one round says enough. A pass of float32 takes as long as all else that is tried.
_BEYOND_CHANCE = 4


@dataclass(frozen=True, slots=True)
class Rule:
    """When to compute in bfloat16."""

    #: `float32`: never; `bfloat16`: wherever its result is near enough; `auto`: only where it is also faster
    wanted: Literal["auto", "float32", "bfloat16"] = "float32"
    #: how far a row may be from its result in float32, as a share of that result's length
    largest_error: float = 0.01


def takes_bfloat16(
    rule: Rule,
    device: torch.device,
    exact: Callable[[], Floats],
    near: Callable[[], Floats],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> bool:
    """Whether to compute in bfloat16, by trying both on the same rows.

    Args:
        rule: says what is asked for.
        device: where both compute.
        exact: computes (n, target) of a sample in float32.
        near: the same in bfloat16.
        clock: tells seconds.
    """
    if not worth_trying(rule, device) or error(exact(), near()) > rule.largest_error:
        return False
    return rule.wanted == "bfloat16" or _is_faster(near, exact, clock)


def worth_trying(rule: Rule, device: torch.device) -> bool:
    """Whether bfloat16 may be taken at all."""
    return rule.wanted == "bfloat16" or (rule.wanted == "auto" and has_bfloat16(device))


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for it, so that it can be worth a try."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # `is_bf16_supported` asks about the first one
    if device.type != "cpu":  # what follows asks about the processor
        return False
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch cannot say
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"))


def in_full_float32() -> None:
    """Let GPUs multiply float32 as it is, though an image or an operator turned TensorFloat-32 on by an environment variable."""
    torch.backends.cuda.matmul.allow_tf32 = False


def error(exact: Floats, near: Floats) -> float:
    """Return the largest error of a row: its distance from its exact result, divided by the length of that result.

    Where that length is 0, the mean length of the exact results takes its place.
    """
    length = np.linalg.norm(exact, axis=1)
    apart = np.linalg.norm(near - exact, axis=1)
    worst = (apart / np.where(length > 0, length, length.mean() or 1)).max()
    return float(worst) if np.isfinite(worst) else np.inf


def _is_faster(near: Callable[[], Floats], exact: Callable[[], Floats], clock: Callable[[], float]) -> bool:
    """Compare the shortest times of some rounds: other work on the machine can only make them longer."""
    enough = _FASTER * min(_seconds(near, clock) for _ in range(_ROUNDS))
    for _ in range(_ROUNDS):
        seconds = _seconds(exact, clock)
        if not enough < seconds < _BEYOND_CHANCE * enough:
            return seconds > enough
    return True


def _seconds(compute: Callable[[], Floats], clock: Callable[[], float]) -> float:
    begun = clock()
    compute()
    return clock() - begun
