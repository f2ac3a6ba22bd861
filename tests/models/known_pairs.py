"""Pairs of vectors of which it is known what a map between them can gain."""

import numpy as np
import torch

from models.evaluation import Metric
from models.fitting import Options, assess
from models.inputs import Pairs
from models.transformations import Linear, LinearTransformation, Transformation
from models.verdict import Direction, Verdict

CLASSES, WIDTH = 12, 8


def views(rows: int, noises: tuple[float, ...], seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Labels, and for each noise a view of them that is independent of the other views."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % CLASSES)
    return labels, [
        (rng.normal(size=(CLASSES, WIDTH))[labels] + noise * rng.normal(size=(rows, WIDTH))).astype(np.float32)
        for noise in noises
    ]


def extracted(scale: float = 0.05) -> Transformation:
    """The map that reads the second half of a vector, which was stored small."""
    module = LinearTransformation(Linear(source_dimension=2 * WIDTH, target_dimension=WIDTH))
    with torch.no_grad():
        module.weight.copy_(torch.cat([torch.zeros(WIDTH, WIDTH), torch.eye(WIDTH) / scale], dim=1))
    return module


def hiding(poor: float, good: float, rows: int = 600, *, labelled: bool = True, seed: int = 0) -> Pairs:
    """An old model that sees one view, and hides in a small part of its vectors all that the new model sees."""
    labels, (first, second) = views(rows, (poor, good), seed)
    old = np.concatenate([first, 0.05 * second], axis=1)
    return Pairs(source=old, target=second, labels=labels if labelled else None)


def judged(
    pairs: Pairs, module: Transformation, metric: Metric = "cosine", direction: Direction = "forward"
) -> Verdict:
    return assess(module, pairs, Options(metric=metric, direction=direction)).verdict


def different(rows: int, *, width: int = 4, labels: np.ndarray | None = None) -> Pairs:
    """Pairs of which no two are nearly equal, and nothing else is known."""
    vectors = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    return Pairs(source=vectors, target=vectors, labels=labels)
