"""An artifact again, in another number type: half the bytes to store and to send, and what that costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from models.artifacts import load, save
from models.runtime import Transform

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROBES = 1_000


def resave(artifact: Path, output: Path, *, dtype: str) -> tuple[str, float]:
    """Write an artifact's map again, in another number type.

    Args:
        artifact: what to read.
        output: what to write.
        dtype: a key of DTYPES.

    Returns:
        The SHA-256 of the new file, and how far the two maps differ on standard normal rows: the mean over rows of the
        difference's length, as a share of the first map's mean length.

    Raises:
        ValueError: an unknown type, a file that is no artifact, or weights too large for the type.
    """
    if dtype not in DTYPES:
        raise ValueError(f"the type {dtype!r} is not one of {', '.join(DTYPES)}")
    module = load(artifact)
    digest = save(output, module, dtype=DTYPES[dtype])
    before, after = Transform(module), Transform(load(output))
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(PROBES, before.source_dimension)).astype(np.float32)
    side = (
        None if before.side_dimension is None else rng.normal(size=(PROBES, before.side_dimension)).astype(np.float32)
    )
    first, second = before(rows, side), after(rows, side)
    length = float(np.linalg.norm(first, axis=1).mean())
    return digest, float(np.linalg.norm(first - second, axis=1).mean()) / (length or 1.0)
