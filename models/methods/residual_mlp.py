"""Drift-Adapter's residual MLP (Vejendla; EMNLP 2025)."""

from __future__ import annotations

from typing import ClassVar

from models.method import Setting, check_range
from models.pairs import Scaled, TrainedPairMaps, pair_plan
from models.plan import Plan
from models.transformations import MAX_WIDTH, LayerSpec, Mlp


class ResidualMlp(TrainedPairMaps):
    """MLP with DSM: s * (skip(q) + W2 GELU(W1 q + b1) + b2), trained by `alignment`; s is folded in at export.

    The skip is the identity where the widths are equal, and linear with a bias where they differ. There is no BatchNorm: a
    few thousand pairs estimate its statistics poorly. The authors' loss and optimizer are not known.
    """

    name: ClassVar[str] = "residual_mlp"

    def __init__(self, setting: Setting, *, hidden: int = 256) -> None:
        """Make the two maps, each with `hidden` units."""
        check_range(1, MAX_WIDTH, hidden=hidden)

        def fresh(source: int, target: int) -> Scaled:
            architecture = Mlp(
                source_dimension=source,
                target_dimension=target,
                layers=(LayerSpec(width=hidden, activation="gelu"), LayerSpec(width=target)),
                residual=True,
            )
            biases = ("layers.0.bias", "layers.1.bias")
            return Scaled(architecture, optional=biases if source == target else (*biases, "skip.bias"))

        super().__init__(setting, fresh)

    @classmethod
    def plan(cls, rows: int) -> Plan:
        """FCT's plan at six times its rate: a higher one learns 500 pairs by heart, a lower one has not converged on 5,000."""
        return pair_plan(rows, learning_rate=3e-3)
