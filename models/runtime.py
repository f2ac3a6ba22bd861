"""An artifact as a function from arrays to arrays, on a device. This is all that search and upgrades see of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models import arithmetic
from models.arithmetic import NumberType, Rule
from models.artifacts import load
from models.folding import folded
from models.packing import packed
from models.staging import Floats, staged
from models.transformations import Transformation, side_dimension

#: Any array of real numbers, perhaps a read-only mapped column.
Vectors = npt.NDArray[Any]

# Rows computed at once. The widest layer of the shipped FCT network then has 16 MB; more rows are no faster.
DEFAULT_BLOCK = 2_048
# Two tiles of a processor's matrix instructions have this many rows: fewer rows take as long.
_FEWEST_ROWS = 32


class Transform:
    """A loaded transformation: `transform(embeddings, side)` maps rows, in blocks, without keeping anything.

    It may be called from several threads at once: weights never change, and each call has its own buffers. A row's
    result does not depend on the rows beside it, up to the rounding of the matrix product.
    """

    def __init__(
        self,
        module: Transformation,
        *,
        device: str | torch.device = "cpu",
        block: int = DEFAULT_BLOCK,
        rule: Rule = Rule(),  # noqa: B008 - it is immutable
        computed_in: NumberType = "float32",
    ) -> None:
        """Put a module to use.

        Args:
            module: the transformation, in float32; it is copied.
            device: where to compute. A CUDA device is first touched here, never at import.
            block: rows computed at once.
            rule: when `quickest` computes in another number type.
            computed_in: the number type of weights and of what lies between two layers.
        """
        if block < 1:
            raise ValueError(f"block must be at least 1 row, not {block}")
        self.architecture = module.architecture
        self.source_dimension = module.architecture.source_dimension
        self.target_dimension = module.architecture.target_dimension
        #: None where no side-information is needed
        self.side_dimension = side_dimension(module.architecture)
        self.device = torch.device(device)
        self.computed_in = computed_in
        self._block = block
        self._rule = rule
        self._dtype = getattr(torch, computed_in)
        if self.device.type == "cuda":
            arithmetic.in_full_float32()  # lineages and trials call it float32
        self._in_few_counts = self.device.type == "cpu" and computed_in != "float32"
        self._module = folded(module).to(self.device, self._dtype)
        if self._in_few_counts:
            packed(self._module, block)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the streams of blocks do not wait for the copy of the weights
        self.has_uncertainty = module.has_uncertainty
        #: how many weights each row is multiplied by: what a row costs
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
        return self._fill((self.target_dimension,), embeddings, side, self._finished)

    def each(self, blocks: Iterable[tuple[Vectors, Vectors | None]]) -> Iterator[Floats]:
        """Transform many blocks of rows, each as a call does; a GPU computes one while the next is copied to it.

        Args:
            blocks: embeddings and side-information, as a call takes them. Each is computed at once, however many rows it has.

        Yields:
            (n, target_dimension) float32 of each block, in the same order.

        Raises:
            ValueError: as for a call.
        """
        return self._staged(blocks, self._finished)

    def quickest(self, embeddings: Vectors, side: Vectors | None = None) -> Transform | None:
        """The faster one of this transformation and the same in bfloat16, as its rule says, by trying both on a sample.

        Args:
            embeddings: a sample of what is to be transformed, as a call takes it.
            side: likewise.

        Returns:
            None if there are too few rows to tell.
        """
        if self.computed_in != "float32":
            return self  # an earlier trial chose it
        rows = slice(0, arithmetic.SAMPLE_ROWS)
        embeddings, side = embeddings[rows], None if side is None else side[rows]
        if len(embeddings) < arithmetic.FEWEST_ROWS:
            return None
        if not arithmetic.worth_trying(self._rule, self.device):
            return self  # and make no second copy of the weights
        near = Transform(self._module, device=self.device, block=self._block, rule=self._rule, computed_in="bfloat16")
        tried = (partial(transform, embeddings, side) for transform in (self, near))
        return near if arithmetic.takes_bfloat16(self._rule, self.device, *tried) else self

    def uncertainty(self, embeddings: Vectors, side: Vectors | None = None) -> Floats | None:
        """Predict the log-variance of each row's transformation (FastFill, ICLR 2023: larger is less certain).

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
        starts = range(0, len(embeddings), self._block)
        blocks = (
            (embeddings[start : start + self._block], None if side is None else side[start : start + self._block])
            for start in starts
        )
        for start, mapped in zip(starts, self._staged(blocks, read), strict=True):
            output[start : start + self._block] = mapped
        return output

    def _staged(
        self, blocks: Iterable[tuple[Vectors, Vectors | None]], read: Callable[[Tensor], Tensor]
    ) -> Iterator[Floats]:
        checked = ((embeddings, self._check(embeddings, side)) for embeddings, side in blocks)
        return staged(checked, partial(self._compute, read), self.device)

    def _finished(self, raw: Tensor) -> Tensor:
        return self._module.finish(raw.float())

    def _compute(self, read: Callable[[Tensor], Tensor], embeddings: Tensor, side: Tensor | None) -> Tensor:
        raw = self._module.raw(self._taken(embeddings), None if side is None else self._taken(side))
        return read(raw)[: len(embeddings)]

    def _taken(self, given: Tensor) -> Tensor:
        """Return `given` in the number type of the computation, with rows of zeros added up to one of the `few_counts`."""
        rows = few_counts(len(given)) if self._in_few_counts else len(given)
        if rows == len(given):
            return given.to(self._dtype)
        taken = given.new_empty((rows, given.shape[1]), dtype=self._dtype)
        taken[: len(given)] = given
        taken[len(given) :] = 0
        return taken

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


def few_counts(rows: int) -> int:
    """Round a number of rows up, by at most half of it, so that few different numbers occur. Pure.

    oneDNN, which computes in bfloat16, compiles a kernel for each layer and each number of rows, and keeps it. With 200 rows
    and a network like FCT's, the first call took 12 ms and later ones 4 ms, and each number of rows took 4 MB of memory or
    more. Nearly every search has another number of candidates. Without this, hardly any search found its kernels made, and
    the process grew for hours.
    """
    step = max(_FEWEST_ROWS, (1 << (rows - 1).bit_length()) // 4)
    return -(-rows // step) * step


def load_transform(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    block: int = DEFAULT_BLOCK,
    rule: Rule = Rule(),  # noqa: B008 - it is immutable
) -> Transform:
    """Load an artifact as a function, after `models.artifacts.check`.

    Args:
        path: the artifact.
        device: where to compute.
        block: rows computed at once.
        rule: when `quickest` computes in another number type.

    Raises:
        UnsafeArtifact: the file is not a well-formed artifact.
    """
    return Transform(load(path), device=device, block=block, rule=rule)
