"""Small image-text dual encoders: two towers, one space, trained by contrast on pairs.

Locked-image tuning (LiT: Zhai, Wang, Mustafa, Steiner, Keysers, Kolesnikov, Beyer; CVPR 2022): the image backbone is
trained before and stays as it is, so its features are computed once, and only what stands on them is trained here. The
text tower is the mean of its words through a small network: captions of one template need no word order, and 50,000 of
them train in seconds on one thread of a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.captions import PADDING, Vocabulary
from models.data import as_tensor
from models.functional import symmetric_info_nce
from models.method import Batch, Task, needed
from models.plan import Plan
from models.training import History, How, train

Floats = npt.NDArray[np.float32]

MAX_SCALE = 100.0  # CLIP's bound on 1 / temperature
EMBED_BATCH = 4_096


class DualEncoder(nn.Module):
    """Images, as a frozen backbone's features, and captions to unit vectors of one space."""

    def __init__(self, vocabulary: Vocabulary, features: int, dimension: int, *, hidden: int = 256) -> None:
        """Make two fresh towers.

        Args:
            vocabulary: the words that the text tower knows.
            features: width of the image backbone's features.
            dimension: width of the space.
            hidden: width of the hidden layer of each tower, and of its words.
        """
        super().__init__()
        self.vocabulary = vocabulary
        self.dimension = dimension
        self.image = _tower(features, hidden, dimension)
        self.words = nn.EmbeddingBag(len(vocabulary), hidden, mode="mean", padding_idx=PADDING)
        nn.init.normal_(self.words.weight, std=0.02)  # little, so that a word that was never seen says nothing
        self.text = _tower(hidden, hidden, dimension)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # where CLIP's starts

    @property
    def scale(self) -> Tensor:
        """1 / temperature, learned."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def images(self, features: Tensor) -> Tensor:
        """Map a backbone's features (n, features) to unit vectors (n, dimension)."""
        return F.normalize(self.image(features), dim=1)

    def texts(self, words: Tensor) -> Tensor:
        """Map captions (n, length) int64, as the vocabulary encodes them, to unit vectors (n, dimension)."""
        return F.normalize(self.text(self.words(words)), dim=1)


class Contrastive(Task):
    """Symmetric InfoNCE between images and their captions, with a learned temperature: CLIP's loss, LiT's setting."""

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        self.dual = dual

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `contrast` over `batch.features` and `batch.texts`."""
        images = self.dual.images(needed(batch.features, "features"))
        texts = self.dual.texts(needed(batch.texts, "texts"))
        return {"contrast": symmetric_info_nce(images, texts, scale=self.dual.scale)}


def train_dual_encoder(
    dual: DualEncoder,
    features: Floats,
    captions: Sequence[str],
    plan: Plan,
    **how: Unpack[How],
) -> History:
    """Train a dual encoder in place on pairs.

    Args:
        dual: fresh, its vocabulary made of these captions.
        features: (n, features) by the frozen image backbone.
        captions: n, the one of the image in the same row.
        plan: how.
        how: as for `models.training.train`.
    """
    rows = Batch(features=as_tensor(features).float(), texts=as_tensor(dual.vocabulary.encode(captions)))
    task = Contrastive(dual)
    return train(task, rows, plan, **how)


def embed_images(dual: DualEncoder, features: Floats) -> Floats:
    """Embed images, given as features (n, features), in eval mode: (n, dimension) float32, of unit length."""
    return _embed(dual.eval().images, as_tensor(features).float())


def embed_texts(dual: DualEncoder, captions: Sequence[str]) -> Floats:
    """Embed captions in eval mode: (n, dimension) float32, of unit length."""
    return _embed(dual.eval().texts, as_tensor(dual.vocabulary.encode(captions)))


def _embed(tower: Callable[[Tensor], Tensor], rows: Tensor) -> Floats:
    with torch.inference_mode():
        starts = range(0, max(1, len(rows)), EMBED_BATCH)  # no rows make one empty part, which has the right width
        parts = [tower(rows[start : start + EMBED_BATCH]) for start in starts]
    vectors: Floats = torch.cat(parts).numpy()
    return vectors


def _tower(inputs: int, hidden: int, dimension: int) -> nn.Sequential:
    """The norm is there because the scale of a backbone's features, or of a mean of words, says nothing."""
    return nn.Sequential(
        nn.LayerNorm(inputs), nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, dimension, bias=False)
    )
