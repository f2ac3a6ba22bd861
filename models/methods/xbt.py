"""Cross-modal Backward-compatible Training, XBT (arXiv 2405.14715, ICCV 2025).

An image-text model is replaced by a better one; the gallery, images or texts, keeps the old model's vectors. A projector
from the new space to the old one is pre-trained on texts alone, which both text towers embed without an image. Then the
old model is gone, and few image-text pairs teach the new model to be at home in the old space.

The two stages, the noise and LoRA are the paper's. Widths, loss terms and numbers are our reconstruction.
"""

from __future__ import annotations

from copy import deepcopy
from typing import ClassVar

import torch
from torch import Tensor

from models import transformations
from models.dual_encoders import DualEncoder
from models.evaluation import Metric
from models.frames import Frame, between
from models.functional import symmetric_info_nce
from models.low_rank_adapters import add_adapters, merge_adapters
from models.method import Batch, Method, Setting, Task, Transformations, check_range, needed
from models.transformations import LayerSpec, Transformation


class Xbt(Method):
    """The first stage: a projector g from the new space to the old, on pairs of vectors of the same texts.

    hat n stands for n / |n|. v = hat n + noise, so that g also learns what is around the texts, where images lie: both towers
    share one space, but each has its own region in it. The losses are 1 - cos(g(hat v), hat o), and symmetric InfoNCE over the
    batch between g(hat v) and hat o.
    """

    name: ClassVar[str] = "xbt"
    metric: ClassVar[Metric | None] = "cosine"

    def __init__(self, setting: Setting, *, expansion: int = 4, noise: float = 0.1, temperature: float = 0.1) -> None:
        """Make a fresh g.

        Args:
            setting: only the two dimensions matter.
            expansion: g is this many times d_new wide inside.
            noise: standard deviation of each of the d_new elements, while training; the vector itself has length 1. On
                captions of CIFAR-100 with d_new = 128, image queries without noise find less than the old model's own, and
                they find most with 0.08 to 0.12, where the noise is about as long as the vector.
            temperature: of InfoNCE.

        Raises:
            ValueError: no expansion, a negative noise or a temperature that is not positive.
        """
        super().__init__(setting)
        check_range(1, transformations.MAX_WIDTH // setting.new_dimension, expansion=expansion)
        if noise < 0 or temperature <= 0:
            raise ValueError(f"noise is at least 0 and temperature positive, not {noise} and {temperature}")
        architecture = transformations.Mlp(
            source_dimension=setting.new_dimension,
            target_dimension=setting.old_dimension,
            layers=(
                LayerSpec(width=expansion * setting.new_dimension, activation="gelu"),
                LayerSpec(width=setting.old_dimension),
            ),
            residual=True,
        )
        square = setting.new_dimension == setting.old_dimension  # where widths differ, the skip always has a weight
        biases = ("layers.0.bias", "layers.1.bias", "skip.bias")
        self.projector = transformations.build(architecture, optional=(*biases, "skip.weight") if square else biases)
        self.old_frame = Frame(setting.old_dimension, metric="cosine")
        self.new_frame = Frame(setting.new_dimension, metric="cosine")
        self.noise = noise
        self.temperature = temperature

    def prepare(self, rows: Batch) -> None:
        """Measure the frames, in which vectors have a root mean square length of 1."""
        for frame, vectors in ((self.old_frame, needed(rows.old, "old")), (self.new_frame, needed(rows.new, "new"))):
            frame.measure(vectors, kept=1.0, deviation=None)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `alignment` and `contrast` over `batch.new` and `batch.old`; noise only in train mode."""
        new, old = self.new_frame(needed(batch.new, "new")), self.old_frame(needed(batch.old, "old"))
        if self.training:
            # drawn on the CPU, whose generator a checkpoint keeps
            new = self.new_frame.landed(new + self.noise * torch.randn(new.shape).to(new))
        predicted = self.old_frame.landed(self.projector.raw(new))
        return {
            "alignment": (predicted - old).square().sum(dim=1).mean() / 2,
            "contrast": symmetric_info_nce(predicted, old, scale=1 / self.temperature),
        }

    def transformations(self) -> Transformations:
        return Transformations(backward=between(self.projector, self.new_frame, self.old_frame))


class XbtTuning(Task):
    """The second stage: LoRA on the new model's towers, so that images and texts meet behind the frozen projector.

    Symmetric InfoNCE between g(n_I(x)) and g(n_T(t)), with n_I and n_T the towers for images x and texts t. No old model takes
    part. Two things keep the vectors in the old space: g is frozen, and a low-rank change that starts from exactly the
    pre-trained state is a small one.
    """

    def __init__(
        self, dual: DualEncoder, projector: Transformation, *, rank: int = 4, temperature: float = 0.1
    ) -> None:
        """Copy both, so that the caller's new model and projector stay what they are.

        Args:
            dual: the new model.
            projector: g, from the first stage.
            rank: of LoRA.
            temperature: of InfoNCE.
        """
        super().__init__()
        self.dual = add_adapters(deepcopy(dual), rank=rank)
        self.projector = deepcopy(projector).requires_grad_(False)
        self.temperature = temperature

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `contrast` over `batch.features` and `batch.texts`."""
        images = self.projector(self.dual.images(needed(batch.features, "features")))
        texts = self.projector(self.dual.texts(needed(batch.texts, "texts")))
        return {"contrast": symmetric_info_nce(images, texts, scale=1 / self.temperature)}

    def tuned(self) -> DualEncoder:
        """Return the new model with its changes merged in: a dual encoder like any other."""
        return merge_adapters(deepcopy(self.dual)).eval().requires_grad_(False)
