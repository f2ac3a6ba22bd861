"""What is stored beside an embedding for upgrades to come (FCT, CVPR 2022): SimCLR's features, or an autoencoder's.

The side-information model may only see what exists when the old model is trained: its images, and no labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.encoders import Encoder
from models.method import Batch, Task, needed


class SimClr(Task):
    """SimCLR (Chen, Kornblith, Norouzi, Hinton; ICML 2020): two views of an image attract, all others repel.

    The encoder's own output is stored; the projection head is only there for the loss.
    """

    def __init__(self, encoder: Encoder, *, projection: int = 128, temperature: float = 0.2) -> None:
        """Put a projection head on an encoder.

        Args:
            encoder: what is trained, and kept.
            projection: width of the head.
            temperature: 0.1 to 0.5; smaller looks harder at the nearest negatives.
        """
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.Linear(encoder.dimension, encoder.dimension), nn.ReLU(), nn.Linear(encoder.dimension, projection)
        )
        self.temperature = temperature

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `nt_xent` over `batch.images` and `batch.views`, two views of the same images."""
        images, views = needed(batch.images, "images"), needed(batch.views, "views")
        projected = self.head(self.encoder(torch.cat([images, views])))
        first, second = projected.chunk(2)
        return {"nt_xent": nt_xent(first, second, temperature=self.temperature)}


class Autoencoder(Task):
    """An encoder whose embedding a decoder turns back into the image: the mean squared error over pixels is minimised.

    The encoder's output is stored; the decoder is only there for the loss.
    """

    def __init__(self, encoder: Encoder, *, channels: int, size: int) -> None:
        """Put a decoder on an encoder.

        Args:
            encoder: what is trained, and kept.
            channels: of the images.
            size: side of the images, a multiple of 4.
        """
        super().__init__()
        if size % 4:
            raise ValueError(f"the decoder doubles the resolution twice, so {size} must be a multiple of 4")
        self.encoder = encoder
        width = 64  # channels of the decoder's smallest map, a quarter of the images' side
        self.decoder = nn.Sequential(
            nn.Linear(encoder.dimension, width * (size // 4) ** 2),
            nn.ReLU(),
            nn.Unflatten(1, (width, size // 4, size // 4)),
            nn.ConvTranspose2d(width, width // 2, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width // 2, channels, kernel_size=4, stride=2, padding=1),
        )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `reconstruction` over `batch.images`."""
        images = needed(batch.images, "images")
        return {"reconstruction": F.mse_loss(self.decoder(self.encoder(images)).float(), images)}


def nt_xent(first: Tensor, second: Tensor, *, temperature: float) -> Tensor:
    """Return the normalised temperature-scaled cross-entropy.

    The mean over all 2n vectors z_i, with z_i' the other view of the same image, of
    -log(exp(cos(z_i, z_i') / t) / sum over k != i of exp(cos(z_i, z_k) / t)).

    Args:
        first: (n, d), row i a view of image i.
        second: (n, d), row i another view of image i.
        temperature: t above.
    """
    n = len(first)
    vectors = F.normalize(torch.cat([first, second]).float(), dim=1)
    logits = (vectors @ vectors.T / temperature).fill_diagonal_(-torch.inf)
    positives = torch.arange(2 * n, device=logits.device).roll(n)
    return F.cross_entropy(logits, positives)
