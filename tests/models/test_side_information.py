import math

import numpy as np
import pytest
import torch

from models.encoders import Design, residual_network
from models.method import Batch
from models.side_information import Autoencoder, SimClr, nt_xent


def formula(first: np.ndarray, second: np.ndarray, t: float) -> float:
    """-log(exp(cos(z, z') / t) / sum over k != i of exp(cos(z, z_k) / t)), averaged over all vectors."""
    z = np.concatenate([first, second])
    n = len(first)

    def attraction(i: int, j: int) -> float:
        return math.exp(float(z[i] @ z[j]) / float(np.linalg.norm(z[i]) * np.linalg.norm(z[j])) / t)

    terms = []
    for i in range(2 * n):
        other = (i + n) % (2 * n)
        terms.append(-math.log(attraction(i, other) / sum(attraction(i, k) for k in range(2 * n) if k != i)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_its_formula(temperature: float) -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 7, 5))
    got = nt_xent(torch.from_numpy(first), torch.from_numpy(second), temperature=temperature)
    assert got.item() == pytest.approx(formula(first, second, temperature), rel=1e-5)


def test_nt_xent_does_not_care_about_scale_or_which_view_comes_first() -> None:
    first, second = torch.randn(2, 6, 4)
    loss = nt_xent(first, second, temperature=0.2)
    torch.testing.assert_close(nt_xent(second, 5 * first, temperature=0.2), loss)


def test_nt_xent_is_lowest_where_views_agree() -> None:
    first, second = torch.randn(2, 16, 32)
    assert nt_xent(first, first, temperature=0.2) < nt_xent(first, second, temperature=0.2)


def test_the_head_is_trained_and_the_encoder_is_kept() -> None:
    encoder = residual_network(Design(widths=(4, 8)), channels=1)
    task = SimClr(encoder, projection=6)
    images = torch.rand(5, 1, 8, 8)
    loss = task.losses(Batch(images=images, views=images.flip(3)))["nt_xent"]
    torch.autograd.backward(loss)
    assert all(p.grad is not None for p in task.parameters())
    assert task.encoder is encoder


def test_a_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        SimClr(residual_network(Design(widths=(4,)), channels=1), temperature=0)


def test_the_autoencoders_loss_is_the_mean_square_over_pixels() -> None:
    task = Autoencoder(residual_network(Design(widths=(4, 8)), channels=3), channels=3, size=8).eval()
    images = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        drawn = task.decoder(task.encoder(images)).numpy()
        expected = ((drawn - images.numpy()) ** 2).sum() / images.numel()
        assert task.losses(Batch(images=images))["reconstruction"].item() == pytest.approx(expected, rel=1e-5)


def test_a_decoder_of_images_that_cannot_be_halved_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        Autoencoder(residual_network(Design(widths=(4,)), channels=1), channels=1, size=10)
