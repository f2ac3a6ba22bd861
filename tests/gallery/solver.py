"""What fits a transformation, where a test is not about training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from gallery.files import digest
from gallery.fits import Asked, Outcome, Tell
from gallery.pairs import Pairs
from tests.gallery.world import PLAIN


class Solver:
    """Fits exactly, since what it is to find is PLAIN; keeps what it was given, and does something between two steps."""

    def __init__(self, between: Callable[[], None] = lambda: None) -> None:
        self.between = between
        self.given: list[tuple[Pairs, Asked]] = []

    def __call__(self, pairs: Pairs, asked: Asked, path: Path, tell: Tell) -> Outcome:
        self.given.append((pairs, asked))
        self.between()
        tell(0.5, "solver")
        solved = np.linalg.lstsq(pairs.source, pairs.target, rcond=None)[0].round().astype(int)
        linear = replace(PLAIN, embedding=solved.tolist())
        path.write_text(json.dumps({"embedding": linear.embedding, "side": None, "head": None}, indent=1))
        return Outcome(
            sha256=digest(path),
            bytes=path.stat().st_size,
            architecture=linear.architecture,
            method="solver",
            evaluation={"cosine": 1.0},
            report={"method": "solver", "warnings": []},
        )
