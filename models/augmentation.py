"""Random views of images, as batched tensor operations: there is no CPU build of torchvision to take them from.

Every image of a batch gets its own random affine map (one `grid_sample` for all), then its own changes of light.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """How much a view may differ. All zero leaves images as they are."""

    #: the shown part's side, as a share of the image's, is drawn from [min_scale, max_scale]; below 1 zooms in
    min_scale: float = 1.0
    max_scale: float = 1.0
    #: the centre of the shown part moves by at most this share of half an image, plus the room that zooming in leaves
    shift: float = 0.0
    #: degrees, either way
    rotation: float = 0.0
    #: log of the aspect ratio, either way
    stretch: float = 0.0
    shear: float = 0.0
    flip: bool = False
    #: brightness, contrast and saturation factors are drawn from [1 - light, 1 + light]
    light: float = 0.0
    #: probability of an image without colour
    grey: float = 0.0
    #: standard deviation of added noise
    noise: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return one random view of each image.

        Args:
            images: (n, channels, height, width) float in [0, 1], on any device.
            generator: the only source of randomness, on the CPU: a view does not depend on the device.

        Returns:
            The same shape, in [0, 1].
        """
        affine = self._affine(len(images), generator).to(images.device)
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        views = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        if self.light or self.grey:
            views = self._light(views, generator)
        if self.noise:
            views = views + self.noise * torch.randn(views.shape, generator=generator).to(views.device)
        return views.clamp(0, 1)

    def _affine(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw maps (n, 2, 3) from places in the view to places in the image."""
        scale = self.min_scale + (self.max_scale - self.min_scale) * torch.rand(n, generator=generator)
        ratio = torch.exp(self.stretch * _symmetric(n, generator) / 2)
        angle = math.radians(self.rotation) * _symmetric(n, generator)
        shear = self.shear * _symmetric(n, generator)
        free = (1 - scale).clamp(min=0) + self.shift
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
        mirror = torch.ones(n)
        if self.flip:
            mirror = (torch.rand(n, generator=generator) < 0.5).float() * 2 - 1
        x = torch.stack([mirror * cos * ratio, (shear * cos - sin) / ratio, free * _symmetric(n, generator)], dim=1)
        y = torch.stack([mirror * sin * ratio, (shear * sin + cos) / ratio, free * _symmetric(n, generator)], dim=1)
        return torch.stack([x, y], dim=1)

    def _light(self, views: Tensor, generator: torch.Generator) -> Tensor:
        shape = (len(views), 1, 1, 1)
        brightness, contrast, saturation = (
            1 + self.light * _symmetric(len(views), generator).view(shape).to(views.device) for _ in range(3)
        )
        views = views * brightness
        mean = views.mean(dim=(1, 2, 3), keepdim=True)
        views = mean + (views - mean) * contrast
        grey = views.mean(dim=1, keepdim=True)
        coloured = (torch.rand(shape, generator=generator) >= self.grey).to(views.device)
        return grey + (views - grey) * saturation * coloured


def _symmetric(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator) * 2 - 1
