"""FastFill (Jaeckle, Faghri, Farhadi, Tuzel, Pouransari; ICLR 2023)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.reducers import DoNothingReducer
from torch import Tensor, nn
from torch.nn import functional as F

from models.method import Batch, Setting, check_range, needed
from models.methods.fct import Fct

#: The paper sets the log-variance no limit. But exp(-s) of a very negative s is infinite, and one such row ends a training.
LOG_VARIANCE_LIMIT = 10.0


class FastFill(Fct):
    """FCT's h with a second output: how wrong it expects to be. A gallery is best re-embedded in the order of that.

    A row's loss is l = mu_sim * l_sim + mu_disc * l_disc, and with s the predicted log-variance the method minimises the
    mean of 0.5 * exp(-s) * l + mu_unc * s. Where l is fixed, the best s is log(l / (2 * mu_unc)): log l at the paper's
    weights. No gradient is cut: where a large s is predicted for
    a row, that row also counts less in the training of h.

    l_sim is FCT's loss of that row. l_disc depends on what there is:

    - the new model's linear classifier and labels: its label-smoothed cross-entropy on h's output, through the frozen
      classifier (the paper);
    - labels only: supervised contrast of h's output with the batch's new vectors, where the
      positives of a row are the new vectors of its class, its own among them. The paper gives no weight for it: its
      mu_disc = 1 is for a cross-entropy. With weight 1, on CIFAR-100, this term outweighs l_sim: CMC-1 before backfilling
      falls from 50 to 43, and re-embedding the uncertain items first brings nothing. With 0.1 both terms have an effect;
    - no labels: none.

    l_sim is measured in units of the new vectors' own deviation, so that its weight beside l_disc does not depend on that model's
    unit. The classifier and the uncertainty head read h's output before it is normalised: the classifier was trained on
    vectors that have a length, and `Transformation.log_variance` is given the same output when a gallery is ranked.
    """

    name: ClassVar[str] = "fastfill"
    optional: ClassVar[tuple[str, ...]] = ("uncertainty.weight", "uncertainty.bias")
    new_head: Tensor | None

    def __init__(
        self,
        setting: Setting,
        *,
        hidden: int = 2048,
        similarity: float = 1.0,
        discrimination: float = 1.0,
        contrast: float = 0.1,
        uncertainty: float = 0.5,
        smoothing: float = 0.1,
        temperature: float = 0.1,
    ) -> None:
        """Make a fresh h.

        Args:
            setting: as for FCT. `new_head` (K, d_new) is the new model's own classifier, without bias.
            hidden: width of the mixer.
            similarity, discrimination, uncertainty: mu_sim, mu_disc, mu_unc.
            contrast: weighs l_disc in mu_disc's place where there is no classifier.
            smoothing: of the labels that the classifier is held to.
            temperature: of the supervised contrast, where there is no classifier.

        Raises:
            ValueError: the classifier does not read vectors of the new model's width, or a hyperparameter out of range.
        """
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        check_range(0, similarity=similarity, discrimination=discrimination, contrast=contrast, uncertainty=uncertainty)
        check_range(0, 1, smoothing=smoothing)
        super().__init__(setting, hidden=hidden)
        head = setting.new_head
        if head is not None and (head.ndim != 2 or head.shape[1] != setting.new_dimension):
            raise ValueError(
                f"new_head has shape {tuple(head.shape)}: it must be (classes, {setting.new_dimension}), "
                "the new model's own classifier"
            )
        self.register_buffer("new_head", None if head is None else head.detach().float(), persistent=False)
        self.similarity = similarity
        self.discrimination = contrast if head is None else discrimination
        self.uncertainty = uncertainty
        self.smoothing = smoothing
        self.contrast = SupConLoss(temperature=temperature, reducer=DoNothingReducer())
        # A head at zero predicts the same variance for every row: the training starts as one without uncertainty.
        for name in self.optional:
            nn.init.zeros_(self.transformation.get_parameter(name))

    def prepare(self, rows: Batch) -> None:
        """Check that the classifier knows every label, and measure the frames."""
        super().prepare(rows)
        labels, head = rows.labels, self.new_head
        if labels is None or head is None or not len(labels):
            return
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(head):
            raise ValueError(
                f"labels lie between {int(labels.min())} and {int(labels.max())}, new_head has {len(head)} classes: "
                "label k must be the classifier's row k"
            )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `likelihood` and `uncertainty` over `batch.old`, `new`, `side` where h takes it, `labels` where known."""
        output = self.raw(batch)
        row = self.row_losses(output, needed(batch.new, "new"), batch.labels)
        predicted = limited(self.transformation.log_variance(output / self.new_frame.deviation))
        return {
            "likelihood": (0.5 * torch.exp(-predicted) * row).mean(),
            "uncertainty": self.uncertainty * predicted.mean(),
        }

    def row_losses(self, output: Tensor, new: Tensor, labels: Tensor | None) -> Tensor:
        """Return each row's l.

        Args:
            output: (n, d_new), what `raw` returns.
            new: (n, d_new), as the new model stores them.
            labels: (n,) int64, or None.

        Returns:
            (n,).
        """
        row = self.similarity * self.apart(output, new)
        if labels is None:
            return row
        return row + self.discrimination * self._discrimination(output, new, labels)

    def _discrimination(self, output: Tensor, new: Tensor, labels: Tensor) -> Tensor:
        if self.new_head is not None:
            logits = F.linear(self.new_frame.back(output), self.new_head)
            return F.cross_entropy(logits, labels, label_smoothing=self.smoothing, reduction="none")
        # The library drops the diagonal where both sides have the very same labels object: it would compare a row with
        # itself. Here the diagonal is h's output beside its own target, a positive like any other: hence the clone.
        landed, native = self.new_frame.landed(output), self.new_frame(new)
        found = self.contrast(landed, labels, ref_emb=native, ref_labels=labels.clone())["loss"]["losses"]
        return torch.as_tensor(found).expand(len(output))  # a batch of one class has nothing to contrast: a bare zero


def limited(log_variance: Tensor) -> Tensor:
    """Cut log-variances (n,) to +-LOG_VARIANCE_LIMIT; gradients pass as if nothing was cut.

    The gradient of a plain clamp is zero outside the limit, so a head that was once outside would never come back. What is
    served is not cut; it puts a gallery in the same order.
    """
    return log_variance + (log_variance.clamp(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT) - log_variance).detach()
