"""How to train: optimizer, batches, and the learning rate's way through the epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

WEIGHT_DECAY = 2.0**-15  # FCT's (CVPR 2022), on every parameter, BatchNorm's too


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to train."""

    epochs: int
    batch: int
    learning_rate: float
    optimizer: Literal["adam", "sgd"]
    weight_decay: float = WEIGHT_DECAY
    momentum: float = 0.9
    #: epochs of warm-up; a short training warms up over a fifth of its epochs if that is less
    warmup: int = 5
    #: when the learning rate changes: with each epoch, as in FCT's code, or with each step, which short trainings need
    schedule: Literal["epoch", "step"] = "step"
    #: multiply in bfloat16 where the device does so natively, which is several times faster there
    bfloat16: bool = False
    #: the gradient's norm is cut to this
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise ValueError(f"training needs an epoch and batches of at least 2, not {self.epochs} and {self.batch}")


def rate_factor(unit: int, units: int, warmup: int) -> float:
    """Return the learning rate's factor: (unit + 1) / warmup, then half a cosine to zero (FCT, CVPR 2022)."""
    if unit < warmup:
        return (unit + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (unit - warmup) / max(1, units - warmup)))


def transformation_plan(rows: int, *, epochs: int = 80, learning_rate: float = 5e-4) -> Plan:
    """Return FCT's plan (CVPR 2022), with batches small enough that few rows still make several steps an epoch."""
    batch = min(1024, max(64, rows // 8))
    return Plan(epochs=epochs, batch=batch, learning_rate=learning_rate, optimizer="adam", schedule="epoch")
