"""Means and products of vectors, summed in float64, in parts that fit the memory: for closed forms and for frames."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 8_192  # rows summed at once in float64: 50 MB at 768 dimensions


def unit(vectors: Tensor) -> Tensor:
    """Return rows (n, d) made of length 1. A zero row stays zero, and its gradient is finite."""
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / torch.where(lengths > 0, lengths, 1)


def mean_row(vectors: Tensor, *, normalize: bool) -> Tensor:
    """Return the mean of rows (n, d) in float64, each made a unit vector first if so asked."""
    total = torch.zeros(vectors.shape[1], dtype=torch.float64)
    for part in torch.split(vectors, CHUNK):
        total += _doubles(part, normalize).sum(dim=0)
    return total / len(vectors)


def spread(vectors: Tensor, mean: Tensor, *, normalize: bool) -> float:
    """Return the sum over rows (n, d) of their squared distance from a mean (d,) float64."""
    return sum(float((_doubles(part, normalize) - mean).square().sum()) for part in torch.split(vectors, CHUNK))


def cross_moment(first: Tensor, second: Tensor, means: tuple[Tensor, Tensor], *, normalize: bool) -> Tensor:
    """Return the sum over rows i of (first_i - mean)(second_i - mean)^T.

    The means are subtracted before products are summed. Subtracted from the sum instead, they would cancel most of its digits.

    Args:
        first: (n, a).
        second: (n, b), row by row the same items.
        means: (a,) and (b,) float64, what is taken off each.
        normalize: make each row a unit vector first.

    Returns:
        (a, b) float64; no copy of size n is made.
    """
    total = torch.zeros(first.shape[1], second.shape[1], dtype=torch.float64)
    for one, other in zip(torch.split(first, CHUNK), torch.split(second, CHUNK), strict=True):
        total += (_doubles(one, normalize) - means[0]).T @ (_doubles(other, normalize) - means[1])
    return total


def _doubles(part: Tensor, normalize: bool) -> Tensor:
    return unit(part.double()) if normalize else part.double()
