"""Drift-Adapter's low-rank affine map (Vejendla; EMNLP 2025)."""

from __future__ import annotations

from typing import ClassVar

from models.method import Setting, check_range
from models.pairs import Scaled, TrainedPairMaps
from models.transformations import LayerSpec, Mlp


class LowRank(TrainedPairMaps):
    """LA with DSM: s * (U V^T q + t), trained by `alignment`; exported as two layers without activation, s folded in.

    They stay two layers and are not multiplied into one: at rank 64 from 768 to 384 dimensions, that is 74,112 numbers to
    multiply with instead of 295,296.
    The authors' loss and optimizer are not known.
    """

    name: ClassVar[str] = "low_rank"

    def __init__(self, setting: Setting, *, rank: int = 64) -> None:
        """Make the two maps.

        Args:
            setting: the two widths.
            rank: width of the bottleneck, the paper's 64. A rank far below both widths costs much quality;
                more than the smaller width means nothing, and is cut to it.

        Raises:
            ValueError: no rank.
        """
        check_range(1, rank=rank)
        rank = min(rank, setting.old_dimension, setting.new_dimension)

        def fresh(source: int, target: int) -> Scaled:
            architecture = Mlp(
                source_dimension=source,
                target_dimension=target,
                layers=(LayerSpec(width=rank), LayerSpec(width=target)),
            )
            return Scaled(architecture, optional=("layers.1.bias",))

        super().__init__(setting, fresh)
