"""The L2 baseline of the MixBCT authors' comparison (2023), as a linear map on pairs."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from models.method import Setting, check_range
from models.pairs import TrainedPairMaps, linear_maps


class L2(TrainedPairMaps):
    """Minimises 10 * mean_i | f(n_i) / |f(n_i)| - o_i / |o_i| |: the norm of the difference, not its square.

    The authors train the new backbone itself by this loss; here both models are frozen, and f is linear with a bias. A norm,
    unlike a square, allows a few pairs that do not fit to stay far apart. It is measured in the target's frame, where it is that
    norm times a constant. Under the Euclidean distance and the inner product, lengths count, so nothing is normalised.
    """

    name: ClassVar[str] = "l2"

    def __init__(self, setting: Setting, *, weight: float = 10.0) -> None:
        check_range(0, weight=weight)
        super().__init__(setting, linear_maps("bias"))
        self.weight = weight

    def distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return the weighted norm of the difference of each pair. Where it is zero, so is its gradient."""
        apart: Tensor = torch.linalg.vector_norm(predicted - target, dim=1)
        return self.weight * apart
