"""What the benchmark trains, and what the papers report for it. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["simclr", "autoencoder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """CIFAR-100, 50 to 100 classes, from the papers' repositories: CMC-1, CMC-5, mAP in percent."""

    new_old: tuple[float, float, float]
    new_new: tuple[float, float, float]
    old_old: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One method with its options."""

    name: str
    method: str
    side: Side | None = None
    #: the old model's vectors are stored with the mean of the training set's taken off
    centred: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    published: Published | None = None


_FCT_OLD, _FCT_NEW = (34.2, 60.6, 16.5), (56.5, 77.0, 36.3)
_BT2_OLD = (33.6, 55.4, 24.4)

RUNS: tuple[Run, ...] = (
    Run(
        name="FCT, SimCLR",
        method="fct",
        side="simclr",
        published=Published(new_old=(50.2, 73.7, 32.2), new_new=_FCT_NEW, old_old=_FCT_OLD),
    ),
    Run(name="FCT, autoencoder", method="fct", side="autoencoder"),
    Run(
        name="FCT, no side-information",
        method="fct",
        published=Published(new_old=(47.2, 72.6, 25.8), new_new=_FCT_NEW, old_old=_FCT_OLD),
    ),
    Run(name="FastFill, SimCLR", method="fastfill", side="simclr"),
    Run(name="FastFill, no side-information", method="fastfill"),
    Run(name="BCT, known classes only", method="bct", options=(("unseen", "skip"),)),
    Run(
        name="BCT, prototypes",
        method="bct",
        options=(("unseen", "prototypes"),),
        published=Published(new_old=(25.0, 62.1, 24.7), new_new=(60.0, 71.9, 47.3), old_old=_BT2_OLD),
    ),
    Run(name="BCT, distillation", method="bct", options=(("unseen", "distillation"),)),
    # the paper's old models end in a BatchNorm, so that their vectors lie around zero
    Run(name="MixBCT, old vectors centred", method="mixbct", centred=True),
    Run(
        name="BT2",
        method="bt2",
        published=Published(new_old=(38.7, 64.6, 27.7), new_new=(62.4, 75.1, 50.5), old_old=_BT2_OLD),
    ),
    Run(name="OCA", method="oca"),
    Run(name="Procrustes", method="procrustes"),
    Run(name="affine", method="affine"),
    Run(name="low rank", method="low_rank"),
    Run(name="residual MLP", method="residual_mlp"),
    Run(name="L2 regression", method="l2"),
    Run(name="lambda-orthogonality", method="lambda_orthogonality"),
)
