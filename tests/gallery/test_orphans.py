"""Files that no row names are found without asking about each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import event

from gallery import fits, fitting, orphans
from gallery.catalog.fits import fit_row
from gallery.catalog.transaction import Catalog
from gallery.files import Files
from gallery.pairs import NewPairs
from gallery.transforms import artifact_file
from tests.gallery.crash import named_files, stored_files
from tests.gallery.solver import Solver
from tests.gallery.world import GALLERY, OLD, PLAIN, SIDE, World


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


@pytest.fixture
def swept(tmp_path: Path, postgres_url: str) -> Iterator[tuple[World, Callable[[str], None]]]:
    """On PostgreSQL, and what has a folder swept right before the next commit after it has files, however young these are."""
    world = World.open(tmp_path / "data", postgres_url).prepare(("forward", "old", "new", PLAIN))
    other = Catalog(postgres_url)

    def sweep_before_commit(folder: str) -> None:
        before, done = set(world.store.files.old(folder, older_than=-1)), False

        @event.listens_for(world.store.catalog.engine, "commit")
        def sweep(_: object) -> None:
            nonlocal done
            new = set(world.store.files.old(folder, older_than=-1)) - before
            if new and not done:
                done = True
                for name in new:
                    os.utime(world.store.files.path(name), (0, 0))
                orphans.remove(other, world.store.files, folder, older_than=60)

    yield world, sweep_before_commit
    other.close()
    world.close()


def test_files_of_no_gallery_are_spared_by_a_sweep_from_their_claim_to_the_commit(
    swept: tuple[World, Callable[[str], None]],
) -> None:
    world, sweep_before_commit = swept
    ids, vectors = [f"i{row}" for row in range(20)], np.random.default_rng(0).integers(-5, 5, (20, OLD)) + 0.5
    world.upsert("old", ids, vectors)
    sweep_before_commit("fits")
    pairs = NewPairs(ids, PLAIN(vectors))
    fit = fits.start(world.store, fits.NewFit(GALLERY, "fitted", "new", pairs, request_sha256="0" * 64)).fit_id
    sweep_before_commit("artifacts")
    assert fitting.advance(world.store, fit, "worker", Solver(), lambda: True)
    with world.store.catalog.reading() as session:
        done = fit_row(session, fit)
        assert (done.state, done.attempts, done.error) == ("completed", 1, None)
        assert world.store.files.path(artifact_file(done.artifact or "")).exists()


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


def test_what_nothing_needs_is_removed_from_a_folder_that_is_reached_by_a_symbolic_link(
    world: World, tmp_path: Path
) -> None:
    orphan = world.store.files.path("columns/1/orphan.npy")
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"12345")
    os.utime(orphan, (0, 0))
    (tmp_path / "link").symlink_to(world.store.files.root)
    linked = Files(tmp_path / "link")
    assert orphans.remove(world.store.catalog, linked, "columns", older_than=60) == ["columns/1/orphan.npy"]
    assert not orphan.exists()
