"""Pieces of losses that several methods share. Each is a formula: no state, no parameter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def alignment(predicted: Tensor, target: Tensor) -> Tensor:
    """Return 1 - cos (n,) of each predicted vector and its target (n, d). It does not depend on their lengths."""
    return 1 - F.cosine_similarity(predicted, target, dim=1)


def class_means(vectors: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the mean vector of each class: the prototypes of BCT, BT2 and OCA.

    Args:
        vectors: (n, d).
        labels: (n,) int64, 0 to classes - 1.
        classes: K.

    Returns:
        (K, d), not normalised.

    Raises:
        ValueError: a class without a row, or a label out of range.
    """
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels lie between {int(labels.min())} and {int(labels.max())}, not 0 and {classes - 1}")
    counts = torch.bincount(labels, minlength=classes)
    if (counts == 0).any():
        empty = int((counts == 0).nonzero()[0])
        raise ValueError(f"class {empty} has no row: a class mean needs at least one")
    sums = torch.zeros(classes, vectors.shape[1], dtype=vectors.dtype).index_add_(0, labels, vectors)
    return sums / counts[:, None]


def symmetric_info_nce(first: Tensor, second: Tensor, *, scale: float | Tensor) -> Tensor:
    """Return the contrastive loss between paired vectors, row i of one with row i of the other: CLIP's.

    The mean over i, and over both directions, of -log(exp(s cos(a_i, b_i)) / sum over k of exp(s cos(a_i, b_k))).

    Args:
        first: (n, d).
        second: (n, d).
        scale: s above, 1 / temperature.
    """
    logits = scale * F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
