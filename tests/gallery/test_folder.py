"""A catalog and a data folder that do not belong together are not brought together."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gallery import folder, orphans
from gallery.catalog.schema import migrate
from gallery.catalog.transaction import Catalog
from gallery.files import Files
from tests.gallery.world import World


@pytest.fixture
def world(each_world: World) -> World:
    """A gallery with two more items."""
    each_world.upsert("old", ["x", "y"], np.eye(2, 4))
    return each_world


@pytest.fixture
def another(tmp_path: Path) -> Iterator[Catalog]:
    """A catalog that names nothing."""
    catalog = Catalog(f"sqlite:///{tmp_path / 'another.sqlite3'}")
    migrate(catalog)
    yield catalog
    catalog.close()


def test_a_folder_that_was_filled_before_folders_bore_an_identity_is_taken_for_the_catalogs_whose_files_it_holds(
    world: World, another: Catalog
) -> None:
    with pytest.raises(folder.ForeignFolderError, match="none of the files that this catalog names"):
        folder.claim(another, world.store.files)
    for _ in range(2):
        folder.claim(world.store.catalog, world.store.files)
    with pytest.raises(folder.ForeignFolderError, match="belongs to another catalog"):
        folder.claim(another, world.store.files)


def test_an_empty_folder_is_that_of_a_catalog_which_names_no_files_and_of_no_other(
    world: World, another: Catalog, tmp_path: Path
) -> None:
    empty = Files(tmp_path / "not mounted")
    with pytest.raises(folder.ForeignFolderError, match="is it mounted"):
        folder.claim(world.store.catalog, empty)
    assert list(empty.root.iterdir()) == []
    folder.claim(another, empty)
    with pytest.raises(folder.ForeignFolderError, match="belongs to another catalog"):
        folder.claim(world.store.catalog, empty)


def test_a_folder_goes_on_to_be_the_catalogs_where_it_is_moved_or_all_of_its_files_are_removed(
    world: World, tmp_path: Path
) -> None:
    folder.claim(world.store.catalog, world.store.files)
    moved = Files(tmp_path / "moved")
    shutil.copytree(world.store.files.root, moved.root, dirs_exist_ok=True)
    for each in orphans.FOLDERS:
        shutil.rmtree(moved.root / each, ignore_errors=True)
    folder.claim(world.store.catalog, moved)
    assert moved.path(folder.NAME).read_text() == world.store.files.path(folder.NAME).read_text()


def test_who_knows_better_says_so_by_what_the_refusal_tells(world: World, tmp_path: Path) -> None:
    empty = Files(tmp_path / "the old disk is lost")
    with pytest.raises(folder.ForeignFolderError) as refused:
        folder.claim(world.store.catalog, empty)
    identity, mark = str(refused.value).rpartition("write ")[2].split(" into ")
    Path(mark).write_text(identity)
    folder.claim(world.store.catalog, empty)
