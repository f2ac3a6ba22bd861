"""LoRA (Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen; ICLR 2022): a frozen linear layer learns a low-rank change.

W x becomes W x + B A x with A (r, inputs) and B (outputs, r): the paper's alpha / r, which scales the change, is 1. B starts at
zero, so training starts from exactly the module that was given, and the change can be merged into W when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_Module = TypeVar("_Module", bound=nn.Module)


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a low-rank change beside it.

    Not a parametrization of `weight`, which torch offers too: copies of such a layer share one class, and merging one of
    them breaks the others.
    """

    def __init__(self, linear: nn.Linear, *, rank: int) -> None:
        """Freeze a layer, and put a change of zero beside it.

        Args:
            linear: the layer; it is not copied.
            rank: r, from 1 to the smaller side of the layer's weight.
        """
        super().__init__()
        outputs, inputs = linear.weight.shape
        if not 1 <= rank <= min(outputs, inputs):
            raise ValueError(f"a weight of {outputs} x {inputs} has no change of rank {rank}")
        self.linear = linear.requires_grad_(False)
        self.a = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5)))
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, values: Tensor) -> Tensor:
        """Map values (n, inputs) to (n, outputs)."""
        output: Tensor = self.linear(values)
        return output + F.linear(F.linear(values, self.a), self.b)

    def merged(self) -> nn.Linear:
        """Add the change to the layer's weight, in place; returns the layer."""
        with torch.no_grad():
            self.linear.weight += self.b @ self.a
        return self.linear


def add_adapters(module: _Module, *, rank: int = 4) -> _Module:
    """Freeze a module, and give each linear layer in it a low-rank change to train. In place; returns the module.

    Args:
        module: holds linear layers.
        rank: r, the same for all; a layer with a side smaller than r gets that many.

    Raises:
        ValueError: no linear layer in the module, or a rank below 1.
    """

    def adapted(layer: nn.Linear) -> AdaptedLinear:
        return AdaptedLinear(layer, rank=min(rank, *layer.weight.shape))

    module.requires_grad_(False)
    if not _replace(module, nn.Linear, adapted):
        raise ValueError("there is no linear layer to adapt")
    return module


def merge_adapters(module: _Module) -> _Module:
    """Put plain linear layers, the changes merged into them, where adapted ones are. In place; returns the module."""
    _replace(module, AdaptedLinear, AdaptedLinear.merged)
    return module


def _replace(module: nn.Module, kind: type[_Module], replacement: Callable[[_Module], nn.Module]) -> int:
    """Replace the layers of a kind, wherever they are in a module; returns how many there were."""
    count = 0
    for name, child in list(module.named_children()):
        if isinstance(child, kind):
            setattr(module, name, replacement(child))
            count += 1
        else:
            count += _replace(child, kind, replacement)
    return count
