"""Backbones behind one function: small residual networks that end as FCT's do.

As in the FCT paper's models (CVPR 2022) the last ReLU is kept, so that embeddings are
non-negative, the map is average-pooled to the embedding, and the classifier is linear without a bias. The widths are
small enough for a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.data import Images, as_floats, as_tensor

EMBED_BATCH = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The sizes of a residual network."""

    #: of the stages, each after the first at half the resolution
    widths: tuple[int, ...]
    #: residual blocks a stage
    blocks: int = 1
    #: images are first cut into patches of this side, whose pixels become channels: 2 halves the resolution, and so the
    #: time of the first stage, the longest, is a quarter
    patch: int = 1
    #: width of the embedding, and of the last block; None: of the last stage
    dimension: int | None = None

    def __post_init__(self) -> None:
        if not self.widths or self.blocks < 1 or self.patch < 1:
            raise ValueError(f"a residual network needs a stage, a block and a patch, not {self}")


class Encoder(nn.Module):
    """A residual network: images (n, channels, height, width) in [0, 1] to embeddings (n, dimension), none negative."""

    def __init__(self, design: Design, channels: int, dimension: int, *, ends_in_relu: bool) -> None:
        super().__init__()
        self.dimension = dimension
        self.patch = design.patch
        self.stem = _convolution(channels * design.patch**2, design.widths[0], kernel=3)
        blocks, width = [], design.widths[0]
        for stage, wider in enumerate(design.widths):
            for block in range(design.blocks):
                last = stage == len(design.widths) - 1 and block == design.blocks - 1
                outputs = dimension if last else wider
                blocks.append(_Residual(width, outputs, stride=2 if stage and not block else 1))
                width = outputs
        if not ends_in_relu:
            blocks[-1].activation = nn.Identity()
        self.stages = nn.Sequential(*blocks)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this form

    def forward(self, images: Tensor) -> Tensor:
        """Embed images; float32 whatever autocast computed in."""
        shown = images * 2 - 1
        if self.patch > 1:
            shown = F.pixel_unshuffle(shown, self.patch).contiguous(memory_format=torch.channels_last)
        features = self.stages(F.relu(self.stem(shown)))
        pooled: Tensor = features.float().mean(dim=(2, 3))
        return pooled


class Classifier(nn.Module):
    """An encoder and its linear head without a bias, on features that are not normalised."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.dimension, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, classes)."""
        logits: Tensor = self.head(self.encoder(images))
        return logits


def residual_network(
    design: Design, *, channels: int, dimension: int | None = None, ends_in_relu: bool = True
) -> Encoder:
    """Make a residual network with fresh weights.

    Args:
        design: its sizes.
        channels: of the images, 1 or 3.
        dimension: another width of the embedding than the design says.
        ends_in_relu: False leaves the last block's sum as it is, so that embeddings have both signs (OCA, MixBCT).
    """
    width = dimension or design.dimension or design.widths[-1]
    return Encoder(design, channels, width, ends_in_relu=ends_in_relu)


def embed(
    model: nn.Module, images: Images, *, batch: int = EMBED_BATCH, device: str | torch.device = "cpu"
) -> npt.NDArray[np.float32]:
    """Embed images with a frozen model in eval mode.

    Args:
        model: an `Encoder`, or any module from images to embeddings.
        images: (n, channels, height, width), uint8 or float in [0, 1].
        batch: images computed at once.
        device: where to compute.

    Returns:
        (n, dimension) float32.
    """
    images = as_tensor(images)
    model = model.to(device).eval()
    with torch.inference_mode():
        starts = range(0, max(1, len(images)), batch)  # no images make one empty part, which has the right width
        parts = [model(as_floats(images[start : start + batch]).to(device)).float().cpu() for start in starts]
    vectors: npt.NDArray[np.float32] = torch.cat(parts).numpy()
    return vectors


class _Residual(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, width, kernel=3, stride=stride)
        self.second = _convolution(width, width, kernel=3)
        changes = stride != 1 or inputs != width
        self.skip = _convolution(inputs, width, kernel=1, stride=stride) if changes else nn.Identity()
        self.activation: nn.Module = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        output = self.second(F.relu(self.first(features)))
        joined: Tensor = self.activation(output + self.skip(features))
        return joined


def _convolution(inputs: int, width: int, *, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, width, kernel, stride=stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(width)
    )
