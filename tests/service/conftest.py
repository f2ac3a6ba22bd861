"""A running service, empty, prepared, or filled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.world import World, opened


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[World]:
    """A service that has nothing."""
    with opened(tmp_path) as world:
        yield world


@pytest.fixture
def world(empty: World) -> World:
    """A service with two models, a transformation, and a gallery of four items in four segments."""
    return empty.prepared().filled()
