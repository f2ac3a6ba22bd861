"""Forward Compatible Training (Ramanujan, Vasu, Farhadi, Tuzel, Pouransari; CVPR 2022)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from models import transformations
from models.frames import Frame, between
from models.method import Batch, Method, Setting, Transformations, needed

#: Of the new vectors that h is trained towards, in the frame. At 1, h learns more by heart. On CIFAR-100's embeddings CMC-1 / mAP
#: was 0.481 / 0.283 at 1 and 0.489 / 0.288 at 5 with 25,000 pairs. With 6,000 pairs it was 0.463 / 0.255 at 1, 0.475 / 0.265 at 5
#: (two seeds, in an eighth of the unit) and 0.413 / 0.211 at 16.
DEVIATION = 5.0


class Fct(Method):
    """Learns h(old embedding, side-information) -> new embedding; the new model stays exactly the independent one.

    Under the Euclidean distance, the paper's, the loss is the mean over all B * d_new elements of (n - h(o, s))^2: no
    normalisation, no label, no weight. Under cosine n and h's output are normalised, which makes it 1 - cos times a
    constant: an h that is trained for one metric loses much of its gain under the other.

    h is trained from the frame of one model to the frame of the other, so that what it reaches depends neither on a model's unit
    nor on what all its vectors have in common. The loss is the paper's times a constant, and what is exported maps vectors as
    they are. In the frame, new vectors keep a mean, at most as long as their distance from it. Without a mean, mAP fell by half a
    point to a whole one; with a longer mean, h learns nothing but the mean.
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
            ),
            optional=self.optional,
        )
        self.old_frame = Frame(setting.old_dimension, metric=setting.metric)
        self.new_frame = Frame(setting.new_dimension, metric=setting.metric)
        self.side_frame = None if setting.side_dimension is None else Frame(setting.side_dimension)

    def prepare(self, rows: Batch) -> None:
        """Measure the frames."""
        self.old_frame.measure(needed(rows.old, "old"))
        if self.side_frame is not None:
            self.side_frame.measure(needed(rows.side, "side"))
        self.new_frame.measure(needed(rows.new, "new"), kept=1.0, deviation=DEVIATION)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `alignment` over `batch.old`, `batch.new`, and `batch.side` where h takes it."""
        return {"alignment": self.apart(self.raw(batch), needed(batch.new, "new")).mean()}

    def raw(self, batch: Batch) -> Tensor:
        """Return h's output (n, d_new) in the new model's frame, before it is normalised."""
        side = batch.side if self.side_frame is None else self.side_frame(needed(batch.side, "side"))
        return self.transformation.raw(self.old_frame(needed(batch.old, "old")), side)

    def apart(self, output: Tensor, new: Tensor) -> Tensor:
        """Return the loss of each row (n,), of what `raw` returns and the new vectors (n, d_new) as they are stored.

        It does not depend on the frame's deviation, so that it weighs the same beside other losses.
        """
        found: Tensor = (self.new_frame.landed(output) - self.new_frame(new)).square().mean(dim=1)
        return found / self.new_frame.deviation.square()

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Switch h to eval mode for the second half: weights keep training, BatchNorm's statistics stand still.

        Inference uses the running statistics. In the second half training uses them too, so that the two no longer differ.
        """
        self.train()
        self.transformation.train(2 * epoch < epochs)

    def exported(self) -> transformations.Transformation:
        """Return h as a map of vectors as they are stored."""
        return between(self.transformation, self.old_frame, self.new_frame, self.side_frame)

    def transformations(self) -> Transformations:
        return Transformations(forward=self.exported())
