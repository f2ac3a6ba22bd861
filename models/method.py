"""What a compatibility method is, and what the training loop needs of anything that trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.transformations import Transformation


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows that belong together. What a task does not use is None."""

    #: (n, channels, height, width) in [0, 1]
    images: Tensor | None = None
    #: a second view of the same images
    views: Tensor | None = None
    #: (n,) int64
    labels: Tensor | None = None
    #: (n, d_old), (n, d_new), (n, d_side): embeddings by the frozen models, of the same (augmented) images
    old: Tensor | None = None
    new: Tensor | None = None
    side: Tensor | None = None

    def __len__(self) -> int:
        return len(next(tensor for tensor in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by name."""
        present = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in present if tensor is not None}

    def take(self, rows: Tensor) -> Batch:
        """Return some rows, by index."""
        return Batch(**{name: tensor[rows] for name, tensor in self.tensors().items()})

    def to(self, device: torch.device) -> Batch:
        """Return the same rows on a device."""
        return Batch(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


@dataclass(frozen=True, slots=True)
class Transformations:
    """What a method offers a gallery: a forward map, a backward map, or both."""

    #: old embedding (+ side-information) -> new
    forward: Transformation | None = None
    #: new embedding -> old
    backward: Transformation | None = None


class Task(nn.Module, ABC):
    """Anything the training loop trains: named losses over batches."""

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return named scalar terms, already weighted; their sum is minimised."""

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Prepare for an epoch, counted from 0: train mode, unless a task's paper says otherwise."""
        del epoch, epochs
        self.train()


class Method(Task):
    """A way to make a new embedding space compatible with an old one."""

    name: ClassVar[str]

    def embed(self, features: Tensor) -> Tensor:
        """Map the new model's features to what the new model stores; the features themselves unless overridden."""
        return features

    @abstractmethod
    def transformations(self) -> Transformations:
        """Return the trained maps, ready for `models.artifacts.save`."""


def needed(tensor: Tensor | None, name: str) -> Tensor:
    """Return a batch's tensor.

    Raises:
        ValueError: the batch does not have it.
    """
    if tensor is None:
        raise ValueError(f"this task needs `{name}` in each batch")
    return tensor
