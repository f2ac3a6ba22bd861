"""LoRA (Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen; ICLR 2022): a frozen linear layer learns a low-rank change.

W becomes W + (alpha / r) B A with A (r, inputs) and B (outputs, r). B starts at zero, so training starts from exactly
the module that was given, and the change can be merged into W when it ends.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_Module = TypeVar("_Module", bound=nn.Module)


class LowRankChange(nn.Module):
    """W -> W + (alpha / r) B A, as a parametrization of a linear layer's weight.

    That adds the change to the weight and not, as the paper draws it, to the output: one more product of (outputs, r)
    with (r, inputs) a step, which is nothing beside a batch, and in return the layer stays an `nn.Linear`.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float) -> None:
        super().__init__()
        if not 1 <= rank <= min(linear.weight.shape):
            raise ValueError(f"a weight {tuple(linear.weight.shape)} has no change of rank {rank}")
        outputs, inputs = linear.weight.shape
        self.a = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5)))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight (outputs, inputs)."""
        return weight + self.scale * self.b @ self.a


def add_adapters(module: _Module, *, rank: int = 4, alpha: float | None = None) -> _Module:
    """Freeze a module, and give each of its linear layers a low-rank change to train. In place; returns the module.

    Args:
        module: holds linear layers.
        rank: r, the same for all layers; a layer with a side smaller than r gets that many.
        alpha: scales the change by alpha / r; r itself unless given, no scaling.

    Raises:
        ValueError: no linear layer in the module, or a rank below 1.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError("there is no linear layer to adapt")
    module.requires_grad_(False)
    for layer in layers:
        narrowed = min(rank, *layer.weight.shape)
        change = LowRankChange(layer, rank=narrowed, alpha=narrowed if alpha is None else alpha)
        parametrize.register_parametrization(layer, "weight", change)
    return module


def merge_adapters(module: _Module) -> _Module:
    """Add each change to its weight, and leave no trace of it. In place; returns the module."""
    for layer in list(module.modules()):
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return module
