"""A running service, empty, prepared, or filled. What takes long to make is made once, and copied."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.world import World, opened


@pytest.fixture(scope="session")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a service that has nothing."""
    folder = tmp_path_factory.mktemp("nothing")
    with opened(folder):
        pass
    return folder / "data"


@pytest.fixture(scope="session")
def four_items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a service with two models, a transformation, and a gallery of four items in four segments."""
    folder = tmp_path_factory.mktemp("four-items")
    with opened(folder) as world:
        world.prepared().filled()
    return folder / "data"


@pytest.fixture
def empty(tmp_path: Path, nothing: Path) -> Iterator[World]:
    """A service that has nothing."""
    shutil.copytree(nothing, tmp_path / "data")
    with opened(tmp_path) as world:
        yield world


@pytest.fixture
def world(tmp_path: Path, four_items: Path) -> Iterator[World]:
    """A service with two models, a transformation, and a gallery of four items in four segments."""
    shutil.copytree(four_items, tmp_path / "data")
    with opened(tmp_path) as found:
        yield found
