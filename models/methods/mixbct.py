"""MixBCT: Towards Self-Adapting Backward-Compatible Training (Liang et al., 2023)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.functional import class_means
from models.method import BackboneMethod, Batch, Setting, check_range, needed
from models.prototypes import checked_labels, class_count

# Short centres turn quickly to where the mixture pulls them; long ones would hold the backbone where it began.
CENTRES_STD = 0.01


class MixBct(BackboneMethod):
    """Classifies a mixture: in each batch some of the new vectors are replaced by the old ones of the same images.

    One loss, ArcFace, and one head, the new one: each class centre has to serve both models. Only credible old vectors are
    mixed in, and no gradient flows from them to the backbone. The features pass a last BatchNorm, its scale fixed at 1,
    before anything is replaced, so that its statistics are the new model's alone.

    The old vectors should lie around zero, like those of the paper's old models, which end in such a BatchNorm too. Vectors that
    come out of a ReLU have no negative element: compared with new vectors, which have both signs, they all look alike, and
    the new model does not become compatible. Subtract the mean from such vectors before they are stored.

    A row can only be replaced by one of its own width, so the new model is made d_old wide; `setting.new_dimension` plays
    no part. Where a batch has fewer credible rows than alpha asks for, all of them are used.
    """

    name: ClassVar[str] = "mixbct"
    ends_in_relu: ClassVar[bool] = False

    credible: Tensor  # (N,) bool, by place in the training set; not kept with the weights, `prepare` makes it anew

    def __init__(
        self, setting: Setting, *, alpha: float = 0.3, keep: float = 0.9, scale: float = 64.0, margin: float = 0.5
    ) -> None:
        """Make a fresh BatchNorm and head.

        Args:
            setting: with `classes`.
            alpha: the share of a batch that is replaced.
            keep: the share of each class that is credible, the paper's T.
            scale: ArcFace's s.
            margin: ArcFace's m, in radians.

        Raises:
            ValueError: a hyperparameter out of range.
        """
        super().__init__(setting)
        if not 0 <= alpha < 1 or not 0 < keep <= 1:
            raise ValueError(
                f"alpha must be at least 0 and below 1, keep above 0 and at most 1, not {alpha} and {keep}"
            )
        check_range(0, scale=scale)
        check_range(0, math.pi, margin=margin)
        self.alpha, self.keep, self.scale, self.margin = alpha, keep, scale, margin
        self.norm = nn.BatchNorm1d(setting.old_dimension)
        self.norm.weight.requires_grad_(False)
        self.centres = nn.Parameter(
            nn.init.normal_(torch.empty(class_count(setting), setting.old_dimension), std=CENTRES_STD)
        )
        self.register_buffer("credible", torch.zeros(0, dtype=torch.bool), persistent=False)

    @property
    def feature_dimension(self) -> int:
        return self.setting.old_dimension

    @property
    def dimension(self) -> int:
        return self.setting.old_dimension

    def prepare(self, rows: Batch) -> None:
        """Find the credible rows of the training set.

        Raises:
            ValueError: labels are missing, out of range or all the same; or fewer rows are credible than alpha asks for.
        """
        labels = checked_labels(rows, len(self.centres))
        self.credible = credible_rows(needed(rows.old, "old"), labels, self.keep)
        share = self.credible.double().mean().item()
        if share < self.alpha:
            raise ValueError(
                f"{share:.0%} of the old vectors are credible, alpha asks for {self.alpha:.0%} of each batch: "
                "raise keep, lower alpha, or look for old vectors that are zero"
            )

    def embed(self, features: Tensor) -> Tensor:
        """Normalise features (n, d_old) by the last BatchNorm."""
        vectors: Tensor = self.norm(features)
        return vectors

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `arcface` of new vectors with some old ones among them; draws which."""
        new, old = self.embed(needed(batch.features, "features")), F.normalize(needed(batch.old, "old"), dim=1)
        chosen = self._choose(needed(batch.index, "index"))
        mixed = torch.where(chosen[:, None], old, new)
        logits = arcface_logits(mixed, self.centres, needed(batch.labels, "labels"), self.scale, self.margin)
        return {"arcface": F.cross_entropy(logits, needed(batch.labels, "labels"))}

    def _choose(self, index: Tensor) -> Tensor:
        """Draw int(alpha * n) credible rows of a batch, or all where there are fewer: (n,) bool."""
        if not len(self.credible):
            raise ValueError("mixing needs to know which rows are credible: call `prepare` with the training set first")
        candidates = self.credible[index].nonzero()[:, 0]
        # drawn on the CPU, whose generator a checkpoint keeps
        order = torch.randperm(len(candidates)).to(candidates.device)
        chosen = torch.zeros(len(index), dtype=torch.bool, device=index.device)
        chosen[candidates[order[: int(self.alpha * len(index))]]] = True
        return chosen


def credible_rows(old: Tensor, labels: Tensor, keep: float) -> Tensor:
    """Return which old vectors lie close enough to their class to be mixed in.

    Rows are normalised, then columns over the data set, so that every coordinate counts alike; each class keeps the
    ceil(keep * n_c) rows closest to its mean. A zero vector has no direction and is never credible.

    Args:
        old: (n, d_old).
        labels: (n,) int64; classes may come in any order, and some may have no row.
        keep: above 0, at most 1.

    Returns:
        (n,) bool.
    """
    present, labels = torch.unique(labels, return_inverse=True)
    even = F.normalize(F.normalize(old, dim=1), dim=0)
    distances = (even - class_means(even, labels, len(present))[labels]).norm(dim=1)
    credible = torch.zeros(len(old), dtype=torch.bool)
    for label in range(len(present)):
        rows = (labels == label).nonzero()[:, 0]
        closest = distances[rows].argsort(stable=True)[: math.ceil(keep * len(rows))]
        credible[rows[closest]] = True
    return credible & (old != 0).any(dim=1)


def arcface_logits(vectors: Tensor, centres: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """Return scale * cos(angle to each centre), the own class's with its angle enlarged by the margin.

    Beyond pi - margin the own class's logit goes on as cos(angle) - sin(margin) * margin. The formula is
    pytorch-metric-learning's, whose arccosine has an infinite derivative where a vector meets its centre; here the sine
    is kept away from zero instead.

    Args:
        vectors: (n, d), centres: (K, d), of any length.
        labels: (n,) int64.
        scale: s.
        margin: m, in radians.

    Returns:
        (n, K).
    """
    cosines = F.linear(F.normalize(vectors, dim=1), F.normalize(centres, dim=1))
    own = cosines.gather(1, labels[:, None])
    sine = (1 - own.square()).clamp(min=1e-7).sqrt()
    enlarged = own * math.cos(margin) - sine * math.sin(margin)
    enlarged = torch.where(own > -math.cos(margin), enlarged, own - math.sin(margin) * margin)
    return scale * cosines.scatter(1, labels[:, None], enlarged)
