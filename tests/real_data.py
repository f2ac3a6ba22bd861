"""Real data for tests, which no repository holds: in the folder that FORWARDFILL_TEST_DATA names, else in one beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("FORWARDFILL_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
IMAGES = FOLDER / "cifar100"
EMBEDDINGS = FOLDER / "cifar100_embeddings.npz"
SIFT = FOLDER / "sift5k" / "sift5k.npz"


def needs(*data: Path) -> pytest.MarkDecorator:
    """Skip a test where some of its data is not there."""
    missing = ", ".join(str(each) for each in data if not each.exists())
    return pytest.mark.skipif(
        bool(missing), reason=f"{missing} is not there; FORWARDFILL_TEST_DATA names the folder of real data"
    )
