"""Least squares with a bias, and with as much ridge as the pairs call for."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from models.method import Batch, Setting, needed
from models.moments import cross_moment, mean_row
from models.pairs import PairMaps, linear_maps

RIDGES = 10.0 ** torch.arange(-6, 3.5, 0.5, dtype=torch.float64)  # what is tried, in mean eigenvalues


class Affine(PairMaps):
    """With centred X (n, a), Y (n, b): W = (X^T X + r I)^-1 X^T Y, and the bias that sends mean to mean.

    With fewer pairs than dimensions X^T X has no inverse, and with a few times as many the noise of its small eigenvalues is
    magnified: the ridge r keeps W small there. It is chosen by generalised cross-validation (Golub, Heath, Wahba 1979),
    which needs the moments only: r minimises RSS(r) / (n - 1 - tr H(r))^2, with H the matrix that maps Y to its fit.
    """

    name: ClassVar[str] = "affine"

    def __init__(self, setting: Setting, *, ridge: float | None = None) -> None:
        """Make the two maps; `prepare` solves them.

        Args:
            setting: under cosine each row is made a unit vector first.
            ridge: r, as a multiple of the mean eigenvalue of X^T X; None: chosen from the pairs.
        """
        if ridge is not None and not ridge > 0:
            raise ValueError(f"ridge must be positive, not {ridge}: without it few pairs have no solution")
        super().__init__(setting, linear_maps("bias"))
        self.ridges = RIDGES if ridge is None else torch.tensor([ridge], dtype=torch.float64)
        self.requires_grad_(False)

    def prepare(self, rows: Batch) -> None:
        """Solve both maps, in float64."""
        super().prepare(rows)
        old, new = needed(rows.old, "old"), needed(rows.new, "new")
        normalize = self.setting.metric == "cosine"
        o, n = mean_row(old, normalize=normalize), mean_row(new, normalize=normalize)
        of_old = cross_moment(old, old, (o, o), normalize=normalize)
        of_new = cross_moment(new, new, (n, n), normalize=normalize)
        of_both = cross_moment(new, old, (n, o), normalize=normalize)
        backward = ridge_regression(of_new, of_both, of_old.trace(), rows=len(old), ridges=self.ridges)
        forward = ridge_regression(of_old, of_both.T, of_new.trace(), rows=len(old), ridges=self.ridges)
        self.to_old.load_state_dict({"weight": backward.T, "bias": o - n @ backward})
        self.to_new.load_state_dict({"weight": forward.T, "bias": n - o @ forward})


def ridge_regression(squares: Tensor, products: Tensor, total: Tensor, *, rows: int, ridges: Tensor) -> Tensor:
    """Solve least squares from centred moments, with the ridge that cross-validates best.

    In the eigenbasis of X^T X, with eigenvalues l and c = E^T X^T Y, every ridge costs one pass over the eigenvalues:
    RSS(r) = |Y|^2 - sum |c|^2 (l + 2r) / (l + r)^2 and tr H(r) = sum l / (l + r).

    Args:
        squares: X^T X (a, a) float64.
        products: X^T Y (a, b) float64.
        total: |Y|^2, the sum of all squares.
        rows: n, from which the moments were summed.
        ridges: what to choose from, in mean eigenvalues of X^T X.

    Returns:
        W (a, b) float64, for Y = X W.
    """
    values, basis = torch.linalg.eigh(squares)
    values = values.clamp(min=0)  # rounding leaves tiny negative ones
    projected = basis.T @ products
    energy = projected.square().sum(dim=1)
    ridge = (ridges * values.mean())[:, None]
    residual = total - (energy * (values + 2 * ridge) / (values + ridge).square()).sum(dim=1)
    freedom = rows - 1 - (values / (values + ridge)).sum(dim=1)
    best = ridge[(residual / freedom.square()).argmin()]
    weight: Tensor = basis @ (projected / (values + best)[:, None])
    return weight
