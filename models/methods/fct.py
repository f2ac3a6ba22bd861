"""Forward Compatible Training (Ramanujan, Vasu, Farhadi, Tuzel, Pouransari; CVPR 2022)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from models import transformations
from models.functional import alignment
from models.method import Batch, Method, Setting, Transformations, needed


class Fct(Method):
    """Learns h(old embedding, side-information) -> new embedding; the new model stays exactly the independent one.

    Under the Euclidean distance, the paper's, the loss is the mean over all B * d_new elements of (n - h(o, s))^2: no
    normalisation, no label, no weight. Under cosine h's output is normalised, and the loss is 1 - cos: an h that
    is trained for one metric loses much of its gain under the other.
    """

    name: ClassVar[str] = "fct"
    #: which of the architecture's optional tensors h has
    optional: ClassVar[tuple[str, ...]] = ()

    def __init__(self, setting: Setting, *, hidden: int = 2048) -> None:
        """Make a fresh h.

        Args:
            setting: without a side dimension the old embedding is fed to both branches, the paper's "no side-info".
            hidden: width of the mixer, the authors' `inner_dim`.
        """
        super().__init__(setting)
        self.transformation = transformations.build(
            transformations.Fct(
                source_dimension=setting.old_dimension,
                target_dimension=setting.new_dimension,
                side_dimension=setting.side_dimension,
                hidden=hidden,
                normalize_output=setting.metric == "cosine",
            ),
            optional=self.optional,
        )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `alignment` over `batch.old`, `batch.new`, and `batch.side` where h takes it."""
        predicted = self.transformation(needed(batch.old, "old"), batch.side)
        return {"alignment": alignment(predicted, needed(batch.new, "new"), metric=self.setting.metric).mean()}

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Switch h to eval mode for the second half: weights keep training, BatchNorm's statistics stand still.

        Inference uses the running statistics; training against them removes the difference between the two.
        """
        self.train()
        self.transformation.train(2 * epoch < epochs)

    def transformations(self) -> Transformations:
        return Transformations(forward=self.transformation)
