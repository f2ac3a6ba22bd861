"""Worlds on SQLite, and on both databases. Each is a copy of one that is migrated and prepared once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import URL

from tests.gallery.world import BACKWARD, WITH_SIDE, World

TEMPLATE = "world_template"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a gallery in old and a forward transformation that needs side-information."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    World.open(folder).prepare(("forward", "old", "new", WITH_SIDE)).close()
    return folder


@pytest.fixture(scope="session")
def prepared_postgres(prepared: Path, postgres_server: URL, postgres_admin: Any) -> None:
    """The same on PostgreSQL, as a database to copy."""
    with postgres_admin.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{TEMPLATE}"'))
    url = postgres_server.set(database=TEMPLATE).render_as_string(hide_password=False)
    World.open(prepared, url).prepare(("forward", "old", "new", WITH_SIDE)).close()


@pytest.fixture
def world(tmp_path: Path, prepared: Path) -> Iterator[World]:
    """A gallery in old, on SQLite, with a forward transformation that needs side-information."""
    shutil.copytree(prepared, tmp_path / "data")
    opened = World.open(tmp_path / "data")
    yield opened
    opened.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def each_world(request: pytest.FixtureRequest, tmp_path: Path, prepared: Path) -> Iterator[World]:
    """The same, once on each database."""
    shutil.copytree(prepared, tmp_path / "data")
    url = ""
    if request.param == "postgresql":
        request.getfixturevalue("prepared_postgres")
        url = request.getfixturevalue("postgres_copy")(TEMPLATE)
    opened = World.open(tmp_path / "data", url)
    yield opened
    opened.close()


@pytest.fixture
def world_both_ways(world: World) -> World:
    """A gallery whose queries can be mapped back, too."""
    world.transformation("backward", "new", "old", BACKWARD)
    return world
