"""A transformation whose weights lie in memory as the processor's matrix instructions read them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from models.transformations import Layer, Transformation


def packed(module: Transformation, rows: int) -> Transformation:
    """Put the weights of the layers of a bfloat16 module, in place, into the order in which oneDNN multiplies by them.

    Otherwise oneDNN reorders them at each call, which is a fifth to a third of its time for a network like FCT's. The result is
    the same. A linear transformation has no layers, and stays as it is.

    Args:
        module: on a CPU, in eval mode, without a batch norm; it is of no use for training any more.
        rows: how many are computed at once, more or less.
    """
    if _can_pack():
        for parent in [*module.modules()]:
            for name, child in [*parent.named_children()]:
                if isinstance(child, nn.Linear):
                    setattr(parent, name, _Packed(child, rows))
    return module


@cache
def _can_pack() -> bool:
    """Whether packing works here, by trying it with one layer.

    PyTorch has these operators for its own compiler, and promises them to nobody else, so we must be able to do without.
    """
    with torch.random.fork_rng(devices=[]):  # so that random numbers elsewhere stay the same
        layer, values = Layer(32, 32, activation="relu", bias=True).bfloat16(), torch.randn(32, 32).bfloat16()
    try:
        supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        with torch.inference_mode():
            return supported and torch.allclose(_Packed(layer, len(values))(values), layer(values), atol=0.05)
    except Exception:  # noqa: BLE001 - another PyTorch may raise anything here; then nothing is packed
        return False


class _Packed(nn.Module):
    """A linear layer, with what follows it."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        self._bias = None if layer.bias is None else layer.bias.detach()
        then = [layer.norm, layer.activation] if isinstance(layer, Layer) else []
        self._then = nn.Sequential(*(each for each in then if not isinstance(each, nn.Identity)))
        self._fused = "none"
        if [*map(type, self._then)] == [nn.ReLU]:  # done by the product itself, before its result leaves the registers
            self._fused, self._then = "relu", nn.Sequential()

    def forward(self, values: Tensor) -> Tensor:
        """Map values (n, inputs) to (n, width)."""
        output = torch.ops.mkldnn._linear_pointwise(values, self._weight, self._bias, self._fused, [], "")
        made: Tensor = self._then(output)
        return made
