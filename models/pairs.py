"""What the maps on pairs share: two maps, one for each direction, and the moments that a closed form is solved from.

A pair is one item embedded by both frozen models. Under cosine the exported maps normalise what comes in and what goes out,
so that neither a model's convention nor a stored vector's length matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.functional import alignment
from models.method import Batch, Method, Setting, Transformations, needed
from models.plan import Plan, transformation_plan
from models.transformations import Linear, Mlp, Transformation, build, optional_tensors

CHUNK = 8_192  # rows summed at once in float64: 50 MB at 768 dimensions
MIN_STEPS = 560  # of Adam: what 80 epochs over 500 pairs make


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
    """A map in each direction, fitted on the same pairs; the two share nothing else.

    A subclass gives the maps, and either solves them in `prepare` or leaves them to the training loop, which minimises the
    mean `distance` of both.
    """

    def __init__(self, setting: Setting, make: Callable[[int, int], Scaled | Transformation]) -> None:
        """Make two fresh maps.

        Args:
            setting: the two widths.
            make: from (source dimension, target dimension) to a map.
        """
        super().__init__(setting)
        self.to_old = make(setting.new_dimension, setting.old_dimension)
        self.to_new = make(setting.old_dimension, setting.new_dimension)

    def prepare(self, rows: Batch) -> None:
        """Check the pairs.

        Raises:
            ValueError: a width is not the setting's, or all vectors of a model are the same.
        """
        check_pairs(rows, self.setting)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `backward`, new to old, and `forward`, old to new: the mean `distance` over the pairs."""
        old, new = needed(batch.old, "old"), needed(batch.new, "new")
        return {
            "backward": self.distance(self.to_old.raw(new), old).mean(),
            "forward": self.distance(self.to_new.raw(old), new).mean(),
        }

    def distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return how far each prediction (n, d), not normalised yet, is from its target (n, d): (n,)."""
        return alignment(predicted, target, metric=self.setting.metric)

    def transformations(self) -> Transformations:
        return Transformations(forward=_plain(self.to_new), backward=_plain(self.to_old))

    @classmethod
    def plan(cls, rows: int) -> Plan:
        """FCT's plan, ten times as fast: a map this small has not arrived after 80 epochs at FCT's rate."""
        return pair_plan(rows, learning_rate=5e-3)


def pair_plan(rows: int, *, learning_rate: float) -> Plan:
    """Return FCT's plan at another rate, with more epochs where 80 would make fewer than `MIN_STEPS` steps."""
    plan = transformation_plan(rows, learning_rate=learning_rate)
    steps = max(1, rows // plan.batch)
    return replace(plan, epochs=max(plan.epochs, -(-MIN_STEPS // steps)))


def linear_maps(setting: Setting, *optional: str) -> Callable[[int, int], Transformation]:
    """Return what `PairMaps` makes linear maps with, which have these optional tensors."""
    cosine = setting.metric == "cosine"

    def make(source: int, target: int) -> Transformation:
        architecture = Linear(
            source_dimension=source, target_dimension=target, normalize_input=cosine, normalize_output=cosine
        )
        return build(architecture, optional=optional)

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


def unit(vectors: Tensor) -> Tensor:
    """Return rows (n, d) made of length 1. A zero row stays zero, and its gradient is finite."""
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / torch.where(lengths > 0, lengths, 1)


def mean_row(vectors: Tensor, *, normalize: bool) -> Tensor:
    """Return the mean of rows (n, d) in float64, each made a unit vector first if so asked."""
    total = torch.zeros(vectors.shape[1], dtype=torch.float64)
    for part in torch.split(vectors, CHUNK):
        total += _doubles(part, normalize).sum(dim=0)
    return total / len(vectors)


def spread(vectors: Tensor, mean: Tensor, *, normalize: bool) -> float:
    """Return the sum over rows (n, d) of their squared distance from a mean (d,) float64."""
    return sum(float((_doubles(part, normalize) - mean).square().sum()) for part in torch.split(vectors, CHUNK))


def cross_moment(first: Tensor, second: Tensor, means: tuple[Tensor, Tensor], *, normalize: bool) -> Tensor:
    """Return the sum over rows i of (first_i - mean)(second_i - mean)^T.

    The means are taken off before products are summed: taken off the sum they would cancel its digits.

    Args:
        first: (n, a).
        second: (n, b), row by row the same items.
        means: (a,) and (b,) float64, what is taken off each.
        normalize: make each row a unit vector first.

    Returns:
        (a, b) float64; no copy of size n is made.
    """
    total = torch.zeros(first.shape[1], second.shape[1], dtype=torch.float64)
    for one, other in zip(torch.split(first, CHUNK), torch.split(second, CHUNK), strict=True):
        total += (_doubles(one, normalize) - means[0]).T @ (_doubles(other, normalize) - means[1])
    return total


def _doubles(part: Tensor, normalize: bool) -> Tensor:
    return unit(part.double()) if normalize else part.double()


def _plain(fitted: Scaled | Transformation) -> Transformation:
    return fitted.folded() if isinstance(fitted, Scaled) else fitted
