"""Worlds on SQLite, and on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gallery.world import BACKWARD, WITH_SIDE, World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A gallery in the model old, on SQLite, with a forward transformation that needs side-information."""
    opened = World.open(tmp_path / "data").prepare(("forward", "old", "new", WITH_SIDE))
    yield opened
    opened.close()


@pytest.fixture
def each_world(tmp_path: Path, catalog_url: str) -> Iterator[World]:
    """The same, once on each database."""
    opened = World.open(tmp_path / "data", catalog_url).prepare(("forward", "old", "new", WITH_SIDE))
    yield opened
    opened.close()


@pytest.fixture
def world_both_ways(tmp_path: Path) -> Iterator[World]:
    """A gallery whose queries can be mapped back, too."""
    opened = World.open(tmp_path / "data").prepare(
        ("forward", "old", "new", WITH_SIDE), ("backward", "new", "old", BACKWARD)
    )
    yield opened
    opened.close()
