"""An artifact as a function from arrays to arrays, on a device. This is all that search and upgrades see of torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.artifacts import load
from models.transformations import Transformation, side_dimension

#: Any array of real numbers, perhaps a read-only mapped column.
Vectors = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

DEFAULT_BLOCK = 8_192  # rows; the widest layer of the shipped FCT network then holds 64 MB


class Transform:
    """A loaded transformation: `transform(embeddings, side)` maps rows, in blocks, without keeping anything.

    It may be called from several threads at once: weights never change, and each call has its own buffers. A row's
    result does not depend on the rows beside it, up to the rounding of the matrix product.
    """

    def __init__(
        self, module: Transformation, *, device: str | torch.device = "cpu", block: int = DEFAULT_BLOCK
    ) -> None:
        """Put a module to use.

        Args:
            module: the transformation; it is put into eval mode.
            device: where to compute. A CUDA device is first touched here, never at import.
            block: rows computed at once.
        """
        if block < 1:
            raise ValueError(f"block must be at least 1 row, not {block}")
        self.architecture = module.architecture
        self.source_dimension = module.architecture.source_dimension
        self.target_dimension = module.architecture.target_dimension
        #: None where no side-information is needed
        self.side_dimension = side_dimension(module.architecture)
        self.device = torch.device(device)
        self._block = block
        self._module = module.to(self.device, torch.float32).eval().requires_grad_(False)
        self.has_uncertainty = module.has_uncertainty
        #: applied to each row, which is what a row costs
        self.weights = sum(each.numel() for each in module.parameters())

    def __call__(self, embeddings: Vectors, side: Vectors | None = None) -> Floats:
        """Transform embeddings.

        Args:
            embeddings: (n, source_dimension), any float type, perhaps read-only; n may be 0.
            side: (n, side_dimension) where the transformation needs it; ignored where it does not.

        Returns:
            (n, target_dimension) float32.

        Raises:
            ValueError: side-information is missing, or a shape is wrong.
        """
        return self._fill((self.target_dimension,), embeddings, side, self._module.finish)

    def uncertainty(self, embeddings: Vectors, side: Vectors | None = None) -> Floats | None:
        """Predict the log-variance of each row's transformation (FastFill, section 3.2: larger is less certain).

        Returns:
            (n,) float32, or None where the transformation has no uncertainty head.

        Raises:
            ValueError: as for a call.
        """
        if not self.has_uncertainty:
            return None
        return self._fill((), embeddings, side, self._module.log_variance)

    def _fill(
        self, shape: tuple[int, ...], embeddings: Vectors, side: Vectors | None, read: Callable[[Tensor], Tensor]
    ) -> Floats:
        side = self._check(embeddings, side)
        output = np.empty((len(embeddings), *shape), np.float32)
        with torch.inference_mode():
            for start in range(0, len(embeddings), self._block):
                rows = slice(start, start + self._block)
                raw = self._module.raw(
                    self._tensor(embeddings[rows]), None if side is None else self._tensor(side[rows])
                )
                output[rows] = read(raw).cpu().numpy()
        return output

    def _tensor(self, vectors: Vectors) -> Tensor:
        # Always a copy: torch warns about read-only arrays, and a mapped column is one.
        return torch.from_numpy(np.array(vectors, dtype=np.float32, order="C")).to(self.device)

    def _check(self, embeddings: Vectors, side: Vectors | None) -> Vectors | None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.source_dimension:
            raise ValueError(f"embeddings must have shape (n, {self.source_dimension}), not {embeddings.shape}")
        if self.side_dimension is None:
            return None
        if side is None:
            raise ValueError(
                f"this transformation needs side-information: pass `side` of shape (n, {self.side_dimension})"
            )
        if side.shape != (len(embeddings), self.side_dimension):
            raise ValueError(f"side must have shape ({len(embeddings)}, {self.side_dimension}), not {side.shape}")
        return side


def load_transform(path: str | Path, *, device: str | torch.device = "cpu", block: int = DEFAULT_BLOCK) -> Transform:
    """Load an artifact as a function, after `models.artifacts.check`.

    Args:
        path: the artifact.
        device: where to compute.
        block: rows computed at once.

    Raises:
        UnsafeArtifact: the file is not a well-formed artifact.
    """
    return Transform(load(path), device=device, block=block)
