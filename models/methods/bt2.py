"""BT2: Backward-compatible Training with Basis Transformation (Zhou et al., ICCV 2023)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from models.functional import alignment
from models.method import BackboneMethod, Batch, Setting, check_range, needed
from models.prototypes import Prototypes, class_count


class Bt2(BackboneMethod):
    """Trains a new model whose first d_old dimensions are the old space; `extra` more keep what does not fit there.

    The backbone gives f, d_new + d_old wide. Its first d_new entries, u, are trained towards an independently trained new model;
    w, a linear map of f, is trained towards the old one. hat v stands for v / |v|. Two orthogonal maps, P and R, change the
    basis of both without loss: z = (first `extra` entries of hat w, P C hat u), and what is stored is R z[:d_old], followed by
    the rest of z. Its length is sqrt(1 + C^2) for every image, so that inner product and cosine rank alike.

    Four losses: cross-entropy of u; 1 - cos of u and the independent new model; 1 - cos of the first d_old dimensions and
    the old model; cross-entropy of these dimensions with the old class means as classifier. The four weights are the paper's.
    Only the logits of the last loss are scaled (see `Prototypes`): `scale=1` is the paper's.
    """

    name: ClassVar[str] = "bt2"

    def __init__(
        self,
        setting: Setting,
        *,
        extra: int = 32,
        length: float = 2.0,
        scale: float = 30.0,
        new_weight: float = 1.0,
        prototype_weight: float = 10.0,
        old_weight: float = 5.0,
    ) -> None:
        """Make fresh maps and a head.

        Args:
            setting: with `classes`.
            extra: how many dimensions wider the stored vectors are than the independent new model's. Above d_old, which
                the paper does not treat, the map to w is made that wide.
            length: C, of the independent part.
            scale: of the logits of the old class means; 1 in the paper.
            new_weight, prototype_weight, old_weight: lambda_1, lambda_2, lambda_3.

        Raises:
            ValueError: the stored vectors would not be wider than the old ones, or a hyperparameter out of range.
        """
        super().__init__(setting)
        old, new = setting.old_dimension, setting.new_dimension
        if extra < 1 or new + extra <= old:
            least = max(1, old - new + 1)
            raise ValueError(
                f"{new} + {extra} dimensions must be more than the old {old}: extra must be at least {least}"
            )
        check_range(0, length=length, scale=scale)
        check_range(0, new_weight=new_weight, prototype_weight=prototype_weight, old_weight=old_weight)
        self.extra, self.length = extra, length
        self.new_weight, self.prototype_weight, self.old_weight = new_weight, prototype_weight, old_weight
        self.to_old = nn.Linear(new + old, max(old, extra))
        self.new_basis = orthogonal(nn.Linear(new, new, bias=False))  # P
        self.old_basis = orthogonal(nn.Linear(old, old, bias=False))  # R
        self.head = nn.Linear(new, class_count(setting), bias=False)
        self.prototypes = Prototypes(setting, scale=scale)

    @property
    def feature_dimension(self) -> int:
        return self.setting.new_dimension + self.setting.old_dimension

    @property
    def dimension(self) -> int:
        return self.setting.new_dimension + self.extra

    def prepare(self, rows: Batch) -> None:
        """Take the old model's class means.

        Raises:
            ValueError: labels are missing, out of range or all the same; a class has no row; or the independent new
                model's vectors are missing.
        """
        needed(rows.new, "new")
        self.prototypes.fit(rows)

    def embed(self, features: Tensor) -> Tensor:
        """Map features (n, d_new + d_old) to (n, d_new + extra), each of the length sqrt(1 + C^2)."""
        return self._join(features, self._independent(features))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `classes`, `new`, `old` and `prototypes`."""
        features, labels = needed(batch.features, "features"), needed(batch.labels, "labels")
        new, old = needed(batch.new, "new"), needed(batch.old, "old")
        independent = self._independent(features)
        compatible = self._join(features, independent)[:, : self.setting.old_dimension]
        return {
            "classes": F.cross_entropy(self.head(independent), labels),
            "new": self.new_weight * alignment(independent, new).mean(),
            "old": self.old_weight * alignment(compatible, old).mean(),
            "prototypes": self.prototype_weight * F.cross_entropy(self.prototypes.logits(compatible), labels),
        }

    def _independent(self, features: Tensor) -> Tensor:
        return F.normalize(features[:, : self.setting.new_dimension], dim=1)  # u

    def _join(self, features: Tensor, independent: Tensor) -> Tensor:
        towards_old = F.normalize(self.to_old(features.relu()), dim=1)  # w
        towards_old = F.normalize(towards_old[:, : self.extra], dim=1)
        joined = torch.cat((towards_old, self.new_basis(self.length * independent)), dim=1)  # z
        old = self.setting.old_dimension
        return torch.cat((self.old_basis(joined[:, :old]), joined[:, old:]), dim=1)
