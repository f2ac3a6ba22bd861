"""What a compatibility method is, and what the training loop needs of anything that trains."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.evaluation import METRICS, Metric
from models.plan import Plan, transformation_plan
from models.transformations import Identity, Transformation, build


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
    #: (n, feature_dimension): the features that the backbone in training gives these images
    features: Tensor | None = None
    #: (n, length) int64: the images' captions, words as numbers, padded
    texts: Tensor | None = None
    #: (n,) int64: places in the training set; the training loop fills it in
    index: Tensor | None = None

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is known before a method is trained: the widths of the spaces, and what the frozen models leave behind."""

    old_dimension: int
    new_dimension: int
    #: None where no side-information is stored
    side_dimension: int | None = None
    #: K, the classes of the new training set; labels are 0 to K - 1. None where there are no labels
    classes: int | None = None
    #: how the new model's vectors are compared when they are searched: what a map on pairs is trained for
    metric: Metric = "euclidean"
    #: (classes the old model knows, d_old) and (K, d_new): the models' own linear classifiers, where there are any
    old_head: Tensor | None = None
    new_head: Tensor | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"the metric {self.metric!r} is not one of {', '.join(METRICS)}")


class Task(nn.Module, ABC):
    """Anything the training loop trains: named losses over batches."""

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return named scalar terms, already weighted; their sum is minimised."""

    def prepare(self, rows: Batch) -> None:
        """See the whole training set once, before the first epoch: class means, closed forms, checks.

        It must depend on nothing but the rows, so that a training that is resumed is prepared exactly as it was at first.

        Raises:
            ValueError: this task cannot be trained on these rows; says what they lack.
        """
        del rows

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Prepare for an epoch, counted from 0: train mode, unless a task's paper says otherwise."""
        del epoch, epochs
        self.train()


class Method(Task):
    """A way to make a new embedding space compatible with an old one.

    A subclass takes a `Setting` and its hyperparameters as keywords, the paper's values as defaults.
    """

    name: ClassVar[str]
    #: the new model's backbone is trained by this method, through `batch.features`;
    #: otherwise the method sees vectors of frozen models only, `batch.old` and `batch.new`
    trains_backbone: ClassVar[bool] = False
    #: a backbone that is trained ends in a ReLU, so that its features are not negative
    ends_in_relu: ClassVar[bool] = True
    #: the method cannot be trained without labels
    needs_labels: ClassVar[bool] = False
    #: how the papers compare vectors; None: as the setting says
    metric: ClassVar[Metric | None] = None

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting

    @property
    def feature_dimension(self) -> int:
        """Width that the backbone must have, where one is trained."""
        return self.setting.new_dimension

    @property
    def dimension(self) -> int:
        """Width of the new model's vectors as they are stored: of what `embed` returns."""
        return self.setting.new_dimension

    def embed(self, features: Tensor) -> Tensor:
        """Map the backbone's features to what the new model stores; the features themselves unless overridden."""
        return features

    @abstractmethod
    def transformations(self) -> Transformations:
        """Return the trained maps, ready for `models.artifacts.save`."""

    @classmethod
    def plan(cls, rows: int) -> Plan:
        """Say how to train on so many pairs of vectors, unless the caller knows better."""
        return transformation_plan(rows)


class BackboneMethod(Method):
    """A method that trains the new model so that its first d_old dimensions are the old space.

    Shorter vectors are padded with zeros. Vectors are compared by cosine, as in all of these papers.
    """

    trains_backbone: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    metric: ClassVar[Metric | None] = "cosine"

    def transformations(self) -> Transformations:
        """Return the map that cuts or pads new vectors to the old width."""
        cut = Identity(
            source_dimension=self.dimension, target_dimension=self.setting.old_dimension, normalize_output=True
        )
        return Transformations(backward=build(cut))


def check_range(least: float, most: float = math.inf, **hyperparameters: float) -> None:
    """Check that hyperparameters are in a range.

    Raises:
        ValueError: names the first that is not.
    """
    allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"
    for name, value in hyperparameters.items():
        if not least <= value <= most:
            raise ValueError(f"{name} must be {allowed}, not {value}")


def needed(tensor: Tensor | None, name: str) -> Tensor:
    """Return a batch's tensor.

    Raises:
        ValueError: the batch does not have it.
    """
    if tensor is None:
        raise ValueError(f"this task needs `{name}` in each batch")
    return tensor
