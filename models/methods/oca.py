"""OCA: Orthogonal Compatible Aligned representations (Ricci et al., ECCV 2024 workshop)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from models.functional import alignment
from models.method import BackboneMethod, Batch, Setting, check_range, needed
from models.prototypes import Prototypes, class_count


class Oca(BackboneMethod):
    """Trains a new model whose first d_old dimensions are the old space and `extra` more are its own.

    What is stored is the backbone's output z, normalised. Its head sees it through an orthogonal layer, so that the
    classifier works in a frame of its own while z's first dimensions stay aligned with the old coordinates; that layer is
    for training only. The new model's width is d_old + extra; `setting.new_dimension` plays no part, and no independent
    new model is needed.

    Three losses with the authors' weights: cross-entropy of the head; cross-entropy of the first d_old dimensions with the
    old class means as classifier; 1 - cos of those dimensions and the own class mean. The second one's logits are scaled
    (see `Prototypes`), and its labels are not smoothed. Smoothed labels ask for a bounded gap between logits. Scaled logits
    exceed that gap on the prototype itself, so the loss would push vectors away from where the third loss wants them.
    `scale=1, prototype_smoothing=0.1` is the paper's.
    """

    name: ClassVar[str] = "oca"
    ends_in_relu: ClassVar[bool] = False

    def __init__(
        self,
        setting: Setting,
        *,
        extra: int = 32,
        scale: float = 30.0,
        smoothing: float = 0.1,
        prototype_smoothing: float = 0.0,
        class_weight: float = 5.0,
        prototype_weight: float = 10.0,
        alignment_weight: float = 5.0,
    ) -> None:
        """Make a fresh orthogonal layer and head.

        Args:
            setting: with `classes`.
            extra: how many dimensions wider the stored vectors are than the old ones.
            scale: of the logits of the old class means; 1 in the paper.
            smoothing: of the head's labels.
            prototype_smoothing: of the labels of the old class means; 0.1 in the paper.
            class_weight, prototype_weight, alignment_weight: of the three losses.

        Raises:
            ValueError: a hyperparameter out of range, or the setting does not say how many classes there are.
        """
        super().__init__(setting)
        check_range(
            0,
            extra=extra,
            scale=scale,
            class_weight=class_weight,
            prototype_weight=prototype_weight,
            alignment_weight=alignment_weight,
        )
        check_range(0, 1, smoothing=smoothing, prototype_smoothing=prototype_smoothing)
        self.extra, self.smoothing, self.prototype_smoothing = extra, smoothing, prototype_smoothing
        self.class_weight, self.prototype_weight, self.alignment_weight = (
            class_weight,
            prototype_weight,
            alignment_weight,
        )
        self.turn = orthogonal(nn.Linear(self.dimension, self.dimension))  # the weight only: the bias is free
        self.head = nn.Linear(self.dimension, class_count(setting), bias=False)
        self.prototypes = Prototypes(setting, scale=scale)

    @property
    def feature_dimension(self) -> int:
        return self.dimension

    @property
    def dimension(self) -> int:
        return self.setting.old_dimension + self.extra

    def prepare(self, rows: Batch) -> None:
        """Take the old model's class means.

        Raises:
            ValueError: labels are missing, out of range or all the same; or a class has no row.
        """
        self.prototypes.fit(rows)

    def embed(self, features: Tensor) -> Tensor:
        """Normalise features (n, d_old + extra)."""
        return F.normalize(features, dim=1)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `classes`, `prototypes` and `alignment`."""
        vectors, labels = self.embed(needed(batch.features, "features")), needed(batch.labels, "labels")
        compatible = vectors[:, : self.setting.old_dimension]
        seen = self.prototypes.logits(compatible)
        apart = alignment(compatible, self.prototypes.of(labels)).mean()
        return {
            "classes": self.class_weight
            * F.cross_entropy(self.logits(vectors), labels, label_smoothing=self.smoothing),
            "prototypes": self.prototype_weight
            * F.cross_entropy(seen, labels, label_smoothing=self.prototype_smoothing),
            "alignment": self.alignment_weight * apart,
        }

    def logits(self, vectors: Tensor) -> Tensor:
        """Return the head's logits (n, K) of vectors (n, d_old + extra) as they are stored."""
        logits: Tensor = self.head(self.turn(vectors))
        return logits
