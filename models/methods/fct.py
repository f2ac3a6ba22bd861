"""Forward Compatible Training (Ramanujan, Vasu, Farhadi, Tuzel, Pouransari; CVPR 2022; methods.md, section 3.1)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from models import transformations
from models.method import Batch, Method, Transformations, needed


class Fct(Method):
    """Learns h(old embedding, side-information) -> new embedding; the new model stays exactly the independent one.

    The loss is the mean over all B * d_new elements of (n - h(o, s))^2: no normalisation, no label, no weight.
    """

    name: ClassVar[str] = "fct"

    def __init__(
        self, *, source_dimension: int, target_dimension: int, side_dimension: int | None, hidden: int = 2048
    ) -> None:
        """Make a fresh h.

        Args:
            source_dimension: width of the old embedding.
            target_dimension: width of the new embedding.
            side_dimension: width of the side-information; None feeds the old embedding to both branches.
            hidden: width of the mixer, the authors' `inner_dim`.
        """
        super().__init__()
        self.transformation = transformations.build(
            transformations.Fct(
                source_dimension=source_dimension,
                target_dimension=target_dimension,
                side_dimension=side_dimension,
                hidden=hidden,
            )
        )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `mse` over `batch.old`, `batch.new`, and `batch.side` where h takes it."""
        predicted = self.transformation(needed(batch.old, "old"), batch.side)
        return {"mse": F.mse_loss(predicted, needed(batch.new, "new"))}

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Switch h to eval mode for the second half: weights keep training, BatchNorm's statistics stand still.

        Inference uses the running statistics; training against them removes the difference between the two.
        """
        self.train()
        self.transformation.train(2 * epoch < epochs)

    def transformations(self) -> Transformations:
        return Transformations(forward=self.transformation)
