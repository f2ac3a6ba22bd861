"""A transformation as it is computed with: what only training needs, the batch norms, is multiplied into the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from models.transformations import BATCH_NORM_EPS, BatchNorm, Layer, Transformation


def folded(module: Transformation) -> Transformation:
    """A copy, in eval mode, in which each batch norm is a part of the layer before it.

    The same map up to the rounding of float32. A batch norm reads and writes every number of a layer once more: without it the
    network of FCT took a tenth less time on a CPU.
    """
    module = copy.deepcopy(module).eval().requires_grad_(False)
    for layer in module.modules():
        if isinstance(layer, Layer) and isinstance(layer.norm, BatchNorm):
            weight, bias = _folded(layer, layer.norm)
            layer.weight, layer.bias = _fixed(weight), _fixed(bias)
            layer.norm = nn.Identity()
    return module


def _folded(layer: Layer, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """(W x + b - mean) scale + shift = (scale W) x + (b - mean) scale + shift; in float64, so that nothing is rounded twice."""
    weight, bias, mean, variance, gain, shift = (
        None if tensor is None else tensor.double()
        for tensor in (layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    scale = gain / torch.sqrt(variance + BATCH_NORM_EPS)
    return weight * scale[:, None], ((0 if bias is None else bias) - mean) * scale + shift


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.float(), requires_grad=False)
