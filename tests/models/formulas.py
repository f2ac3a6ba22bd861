"""Papers' formulas are recomputed in NumPy, in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]


def numbers(tensor: torch.Tensor | None) -> Array:
    assert tensor is not None
    values: Array = tensor.detach().double().numpy()
    return values


def units(vectors: Array, axis: int = 1) -> Array:
    scaled: Array = vectors / np.linalg.norm(vectors, axis=axis, keepdims=True)
    return scaled
