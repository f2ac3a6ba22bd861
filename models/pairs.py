"""What the maps on pairs share: two maps, one for each direction, solved or trained.

A pair is one item embedded by both frozen models. Under cosine the exported maps normalise what comes in and what goes out,
so that neither a model's convention nor a stored vector's length matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.frames import Frame, between
from models.method import Batch, Method, Setting, Transformations, needed
from models.moments import CHUNK
from models.plan import Plan, transformation_plan
from models.transformations import Linear, Mlp, Transformation, build, optional_tensors

MIN_STEPS = 560  # the fewest steps of Adam: as many as 80 epochs over 500 pairs make


class Scaled(nn.Module):
    """An MLP whose output is multiplied elementwise by a learned vector: Drift-Adapter's DSM (EMNLP 2025)."""

    def __init__(self, architecture: Mlp, *, optional: tuple[str, ...]) -> None:
        super().__init__()
        self.architecture = architecture
        self.inner = build(architecture, optional=optional)
        self.scale = nn.Parameter(torch.ones(architecture.target_dimension))

    def raw(self, embeddings: Tensor) -> Tensor:
        """Map (n, d_source) to (n, d_target), before the output is normalised."""
        return self.scale * self.inner.raw(embeddings)

    def folded(self) -> Transformation:
        """Return the same map as a plain MLP: the scale goes into the last layer, and into the skip."""
        tensors = {name: tensor.detach().clone() for name, tensor in self.inner.state_dict().items()}
        if self.architecture.residual:  # a skip that was the identity becomes a diagonal
            tensors.setdefault("skip.weight", torch.eye(len(self.scale), device=self.scale.device))
        last = f"layers.{len(self.architecture.layers) - 1}."
        for name, tensor in tensors.items():
            if name.startswith((last, "skip.")):
                tensor.mul_(self.scale.detach().reshape(-1, *[1] * (tensor.ndim - 1)))
        folded = build(self.architecture, optional=optional_tensors(self.architecture).keys() & tensors.keys())
        folded.load_state_dict(tensors)
        return folded.to(self.scale.device)


class PairMaps(Method):
    """A map in each direction, solved from the same pairs by `prepare`; the two share nothing else.

    They go from one model's frame to the other's, and so normalise nothing themselves: what is exported does.
    """

    def __init__(self, setting: Setting, make: Callable[[int, int], Scaled | Transformation]) -> None:
        """Make two fresh maps.

        Args:
            setting: the two widths, and the metric.
            make: from (source dimension, target dimension) to a map.
        """
        super().__init__(setting)
        self.to_old = make(setting.new_dimension, setting.old_dimension)
        self.to_new = make(setting.old_dimension, setting.new_dimension)
        self.old_frame = Frame(setting.old_dimension, metric=setting.metric)
        self.new_frame = Frame(setting.new_dimension, metric=setting.metric)

    def prepare(self, rows: Batch) -> None:
        """Check the pairs.

        Raises:
            ValueError: a width is not the setting's, or all vectors of a model are the same.
        """
        check_pairs(rows, self.setting)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `backward`, new to old, and `forward`, old to new: the mean `distance` over the pairs, in the frames."""
        old, new = self.old_frame(needed(batch.old, "old")), self.new_frame(needed(batch.new, "new"))
        return {
            "backward": self.distance(self.old_frame.landed(self.to_old.raw(new)), old).mean(),
            "forward": self.distance(self.new_frame.landed(self.to_new.raw(old)), new).mean(),
        }

    def distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return how far each prediction (n, d) is from its target (n, d): (n,)."""
        return (predicted - target).square().mean(dim=1)

    def transformations(self) -> Transformations:
        return Transformations(
            forward=between(_plain(self.to_new), self.old_frame, self.new_frame),
            backward=between(_plain(self.to_old), self.new_frame, self.old_frame),
        )


class TrainedPairMaps(PairMaps):
    """Maps that the training loop brings closer, by the mean `distance` of both.

    `prepare` measures the frames in which the maps are trained. There the loss is that of the vectors as they are, times a
    constant. What the training reaches depends neither on a model's unit nor on what all its vectors have in common.
    """

    def prepare(self, rows: Batch) -> None:
        """Check the pairs, and measure the frames."""
        super().prepare(rows)
        self.old_frame.measure(needed(rows.old, "old"))
        self.new_frame.measure(needed(rows.new, "new"))

    @classmethod
    def plan(cls, rows: int) -> Plan:
        """FCT's plan at ten times its learning rate: at FCT's own rate a map this small has not converged after 80 epochs."""
        return pair_plan(rows, learning_rate=5e-3)


def pair_plan(rows: int, *, learning_rate: float) -> Plan:
    """Return FCT's plan at another rate, with more epochs where 80 would make fewer than `MIN_STEPS` steps."""
    plan = transformation_plan(rows, learning_rate=learning_rate)
    steps = max(1, rows // plan.batch)
    return replace(plan, epochs=max(plan.epochs, -(-MIN_STEPS // steps)))


def linear_maps(*optional: str) -> Callable[[int, int], Transformation]:
    """Return a function with which `PairMaps` makes linear maps that have these optional tensors."""

    def make(source: int, target: int) -> Transformation:
        return build(Linear(source_dimension=source, target_dimension=target), optional=optional)

    return make


def check_pairs(rows: Batch, setting: Setting) -> None:
    """Check that pairs are what a setting says, and that there is something to fit.

    Raises:
        ValueError: a width is not the setting's, or all vectors of a model are the same.
    """
    pairs = {"old": (rows.old, setting.old_dimension), "new": (rows.new, setting.new_dimension)}
    for name, (given, width) in pairs.items():
        vectors = needed(given, name)
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise ValueError(f"`{name}` has shape {tuple(vectors.shape)}, the setting says (n, {width})")
        if all(bool((part == vectors[0]).all()) for part in torch.split(vectors, CHUNK)):
            raise ValueError(f"all rows of `{name}` are the same: give pairs of different items, or check that model")


def _plain(fitted: Scaled | Transformation) -> Transformation:
    return fitted.folded() if isinstance(fitted, Scaled) else fitted
