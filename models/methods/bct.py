"""Backward-Compatible Training (Shen, Xiong, Xia, Soatto; CVPR 2020)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.functional import class_means
from models.method import BackboneMethod, Batch, Setting, check_range, needed
from models.prototypes import checked_labels, class_count

Unseen = Literal["prototypes", "completed", "skip", "distillation"]
FIT_ROWS = 10_000  # d_old + 1 numbers are fitted to them, which more rows do not make better


class Bct(BackboneMethod):
    """Trains the new model to be classified by its own head and, as if it were the old model, by the old one's.

    With n the new vector of an image and y its label, the loss is CE(new head(n), y) + weight * influence. The influence is the
    cross-entropy of a frozen classifier of old vectors, which is given n's first d_old dimensions (padded with zeros where
    there are fewer). `unseen` says which classifier, named after what it does about classes that the old model never saw:

    - prototypes: the class means of the old vectors, for every class. Its logits are `scale` times cosines: unscaled ones
      would hold the loss near ln K, and only attract.
    - completed: the old head, W_o, with one more row for each class that it does not know, made of the mean of that class
      (the paper's way; see `completed_head`). Classes are numbered so that the unknown ones come after the head's own rows.
    - skip: the old head as it is; samples of classes that it does not know have no influence term.
    - distillation: the old head as it is; the target of every sample is what the head says of its old vector. A head of few
      classes reads few dimensions. The loss leaves the others free, but a search by cosine compares them too.

    An old head's logits keep its own scale: n is given the mean length of the old vectors. With its own length, n would
    satisfy the head just by growing, which a search by cosine does not see. Also, a head's rows are not where the vectors of
    its classes lie. That costs a search more than means instead of a head cost a classifier: hence the default.

    The old head has no bias, like every head in this library. For an old model whose head has one, append a 1 to its vectors
    and the bias to the rows of its head.
    """

    name: ClassVar[str] = "bct"

    classifier: Tensor  # (classes it knows, d_old)
    length: Tensor  # (), the mean of the old vectors'

    def __init__(
        self,
        setting: Setting,
        *,
        unseen: Unseen = "prototypes",
        weight: float = 1.0,
        scale: float = 30.0,
        smoothing: float = 0.1,
    ) -> None:
        """Make a fresh new head, and a place for the classifier of old vectors.

        Args:
            setting: with `classes`; with `old_head` unless `unseen` is "prototypes".
            unseen: what classifies old vectors, and what it does about classes that the old model never saw.
            weight: of the influence, the paper's lambda: 1 in openBCT, 10 in BT2's and OCA's repositories.
            scale: of the prototypes' cosines; an old head has its own.
            smoothing: of the new head's labels, 0.1 in BT2's repository; the influence has none.

        Raises:
            ValueError: there is no old head where one is needed, or it has another width; or a hyperparameter out of range.
        """
        super().__init__(setting)
        check_range(0, weight=weight, scale=scale)
        check_range(0, 1, smoothing=smoothing)
        classes = class_count(setting)
        self.unseen, self.weight, self.scale, self.smoothing = unseen, weight, scale, smoothing
        self.head = nn.Linear(setting.new_dimension, classes, bias=False)
        self.old_head = None if unseen == "prototypes" else _needed_head(setting, unseen)
        known = classes if self.old_head is None else len(self.old_head)
        rows = max(known, classes) if unseen == "completed" else known
        self.register_buffer("classifier", torch.zeros(rows, setting.old_dimension))
        self.register_buffer("length", torch.ones(()))

    def prepare(self, rows: Batch) -> None:
        """Make the classifier of old vectors.

        Raises:
            ValueError: labels are missing, out of range or all the same; or a class has no row to make a prototype of.
        """
        classes = self.head.out_features
        labels, old = checked_labels(rows, classes), needed(rows.old, "old")
        self.length.copy_(old.norm(dim=1).mean())
        if self.old_head is None:
            self.classifier.copy_(class_means(F.normalize(old, dim=1), labels, classes))
        elif len(self.old_head) < len(self.classifier):
            self.classifier.copy_(completed_head(self.old_head, old, labels, classes))
        else:
            self.classifier.copy_(self.old_head)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `classes`, of the new head, and `influence`, of the old classifier."""
        features, labels = needed(batch.features, "features"), needed(batch.labels, "labels")
        return {
            "classes": F.cross_entropy(self.head(features), labels, label_smoothing=self.smoothing),
            "influence": self.weight * self._influence(features, labels, batch.old),
        }

    def old_logits(self, vectors: Tensor) -> Tensor:
        """Return what the frozen classifier says of directions (n, d_old) in the old space: (n, classes it knows)."""
        directions = F.normalize(vectors, dim=1)
        if self.old_head is None:
            return self.scale * F.linear(directions, F.normalize(self.classifier, dim=1))
        return F.linear(self.length * directions, self.classifier)

    def _influence(self, features: Tensor, labels: Tensor, old: Tensor | None) -> Tensor:
        missing = self.setting.old_dimension - self.setting.new_dimension
        logits = self.old_logits(F.pad(features, (0, missing)))  # a negative padding truncates
        if self.unseen == "distillation":
            return F.cross_entropy(logits, F.linear(needed(old, "old"), self.classifier).softmax(dim=1))
        known = labels < len(self.classifier)
        if not known.any():
            return 0 * logits.sum()
        return F.cross_entropy(logits[known], labels[known])


def completed_head(head: Tensor, old: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Give an old head a row for each class that it does not know, made of the class means of the old vectors.

    Means cannot simply be put below a trained head's rows, for two reasons. Non-negative vectors have large inner products
    with every mean and small ones with every trained row, so all of them would be classified as unseen. And a softmax gives
    the same result if one vector is added to all rows, so the zero point of a trained head is arbitrary. Row k is therefore
    factor * mean_k + offset, with the one factor and the one offset for which the completed head classifies the old vectors
    best; the head's own rows stay as they are. That is a convex problem in d_old + 1 numbers. Its unit is the root mean square
    of the old vectors' elements: in another unit the start is so far from the end that the solver does not get there.

    Args:
        head: (known, d_old), known < classes.
        old: (n, d_old), as the head was trained on.
        labels: (n,) int64.
        classes: K.

    Returns:
        (K, d_old).
    """
    unit = old.square().mean().sqrt()
    old, known = old / unit, head * unit
    means = class_means(old, labels, classes)[len(head) :]
    every = math.ceil(len(old) / FIT_ROWS)
    old, labels = old[::every], labels[::every]
    with torch.enable_grad():
        factor, offset = torch.ones((), requires_grad=True), torch.zeros(old.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([factor, offset], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> float:
            optimizer.zero_grad()
            logits = F.linear(old, torch.cat((known, factor * means + offset)))
            # the small weight keeps classes that are separable from pushing the numbers to infinity
            value = F.cross_entropy(logits, labels) + 1e-4 * (factor.square() + offset.square().sum())
            torch.autograd.backward(value)
            return float(value.detach())

        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return torch.cat((head, (factor.detach() * means + offset.detach()) / unit))


def _needed_head(setting: Setting, unseen: Unseen) -> Tensor:
    head = setting.old_head
    if head is None:
        raise ValueError(f"{unseen!r} needs the old model's head: set `old_head` of the setting, or use 'prototypes'")
    if head.shape[1] != setting.old_dimension:
        raise ValueError(f"the old head is {head.shape[1]} wide, the old vectors are {setting.old_dimension}")
    return head.detach().float().cpu()
