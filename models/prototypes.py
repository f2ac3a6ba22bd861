"""Classes as the old model sees them: what the methods that train a backbone with labels share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.functional import class_means
from models.method import Batch, Setting, needed


class Prototypes(nn.Module):
    """The class means of the old model's unit vectors, frozen, as a classifier of whatever lives in its space.

    The means are not normalised, as in BT2's and OCA's code: a class that the old model scatters has a shorter one. The
    papers' logits are these inner products as they are, `scale` 1. They lie in [-1, 1], so that a softmax over K classes
    stays near uniform and its cross-entropy near ln K whatever the vectors do: the term only attracts to the own
    prototype. With a scale of 16 to 64 the term also tells the classes apart.
    """

    rows: Tensor  # (K, d_old)

    def __init__(self, setting: Setting, *, scale: float) -> None:
        """Make a place for the means; `fit` fills it.

        Raises:
            ValueError: the setting does not say how many classes there are, or says fewer than two.
        """
        super().__init__()
        self.scale = scale
        self.register_buffer("rows", torch.zeros(class_count(setting), setting.old_dimension))

    def fit(self, rows: Batch) -> None:
        """Take the means of a training set's old vectors.

        Raises:
            ValueError: labels are missing, out of range or all the same, or a class has no row.
        """
        labels = checked_labels(rows, len(self.rows))
        self.rows.copy_(class_means(F.normalize(needed(rows.old, "old"), dim=1), labels, len(self.rows)))

    def logits(self, vectors: Tensor) -> Tensor:
        """Return scale * (v / |v|) . prototype, (n, K), for vectors v (n, d_old) of any length."""
        return self.scale * F.linear(F.normalize(vectors, dim=1), self.rows)

    def of(self, labels: Tensor) -> Tensor:
        """Return each label's prototype, (n, d_old)."""
        return self.rows[labels]


def class_count(setting: Setting) -> int:
    """Return K.

    Raises:
        ValueError: the setting has no classes, or fewer than two.
    """
    if setting.classes is None:
        raise ValueError("this method needs labels: set `classes` of the setting to how many classes there are")
    if setting.classes < 2:
        raise ValueError(f"a classifier needs at least two classes, `classes` of the setting is {setting.classes}")
    return setting.classes


def checked_labels(rows: Batch, classes: int) -> Tensor:
    """Return a training set's labels.

    Raises:
        ValueError: there are none, one is not in 0 to classes - 1, or all are the same.
    """
    labels = needed(rows.labels, "labels")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels lie between {low} and {high}, not 0 and {classes - 1}: number the classes from 0")
    if low == high:
        raise ValueError(f"every row has the label {low}: a classifier needs rows of at least two classes")
    return labels
