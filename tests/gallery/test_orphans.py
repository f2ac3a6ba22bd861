"""Files that no row names are found without asking about each."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from sqlalchemy import event

from gallery import orphans
from tests.gallery.crash import named_files, stored_files
from tests.gallery.world import OLD, SIDE, World


@pytest.fixture
def statements(each_world: World) -> Iterator[list[str]]:
    """What the catalog was asked."""
    asked: list[str] = []

    def listen(_c: object, _cursor: object, statement: str, *_: object) -> None:
        asked.append(statement)

    event.listen(each_world.store.catalog.engine, "before_cursor_execute", listen)
    yield asked
    event.remove(each_world.store.catalog.engine, "before_cursor_execute", listen)


def found(world: World) -> set[str]:
    return {
        name
        for folder in orphans.FOLDERS
        for name in orphans.found(world.store.catalog, world.store.files, folder, older_than=60)
    }


def test_it_takes_no_more_statements_to_find_orphans_among_many_files(each_world: World, statements: list[str]) -> None:
    for at in range(20):
        each_world.upsert("old", [str(at)], np.ones((1, OLD)), side=np.ones((1, SIDE)))
    root = each_world.store.files.root
    (root / "columns" / "1" / "orphan.npy").write_bytes(b"x")
    for name in stored_files(root):
        os.utime(root / name, (0, 0))
    assert len(named_files(each_world)) == 60
    statements.clear()
    assert found(each_world) == {"columns/1/orphan.npy"}
    assert len(statements) < 40
