"""A segment's new column, read, transformed and written block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery import errors
from gallery.arrays import Stored, Vectors
from gallery.catalog import models as model_rows
from gallery.columns import open_column, verify, write
from gallery.transforms import Block, Transforms
from gallery.upgrade.pipeline import Input, Work, derive
from tests.gallery.crash import stored_files
from tests.gallery.world import NEW, OLD, SIDE, WITH_SIDE, World

ROWS = 23
VECTORS = np.random.default_rng(0).integers(-9, 10, (ROWS, OLD)).astype(np.float32)
SIDES = np.random.default_rng(1).integers(-9, 10, (ROWS, SIDE)).astype(np.float32)


class Doubling:
    """An artifact that is handed blocks, and makes twice as much of them once it saw a sample of five rows."""

    def __init__(self, times: int = 1) -> None:
        self.rows: list[int] = []
        self.samples: list[int] = []
        self.computed_in = "float32" if times == 1 else "doubles"
        self._times = times

    def __call__(self, embeddings: Stored, side: Stored | None = None) -> Vectors:
        raise AssertionError("it is faster if it is handed blocks")

    def quickest(self, embeddings: Stored, side: Stored | None = None) -> Doubling | None:
        """See `Bulk`."""
        self.samples.append(len(embeddings))
        return QUICK if len(embeddings) >= 5 else None

    def each(self, blocks: Iterator[Block]) -> Iterator[Vectors]:
        """See `Bulk`."""
        for embeddings, side in blocks:
            self.rows.append(len(embeddings))
            yield self._times * WITH_SIDE(embeddings, side)


QUICK = Doubling(2)


def work(world: World, *, normalized: bool = False, **other: Any) -> Work:
    """What makes a column of VECTORS and SIDES."""
    files = world.store.files
    source, side = write(files, "columns/1", VECTORS, "float32"), write(files, "columns/1", SIDES, "float32")
    with world.store.catalog.reading() as session:
        by = model_rows.as_transformation(model_rows.transformation_row(session, "forward"))
        target = model_rows.as_model(model_rows.model_row(session, "new"))
    made = Work(
        source=Input(source.name, source.sha256, OLD),
        side=Input(side.name, side.sha256, SIDE),
        transformation=by,
        target=replace(target, normalized=normalized),
        rows=ROWS,
        folder="columns/1",
        dtype="float32",
    )
    return replace(made, **other)


def column(world: World, made: Work) -> Stored:
    """Derive, and read what there is then."""
    written = derive(world.store, made).column
    verify(world.store.files, written.name, written.sha256)
    return open_column(world.store.files.path(written.name), rows=ROWS, dimension=NEW)


@pytest.mark.parametrize("block_rows", [1, 5, ROWS, 1000])
def test_a_column_is_the_same_in_blocks_of_any_size(world: World, block_rows: int) -> None:
    world = World.open(world.store.files.root, block_rows=block_rows)
    assert np.array_equal(column(world, work(world)), WITH_SIDE(VECTORS, SIDES))
    world.close()


def test_a_column_without_side_information_is_made_with_zeros(world: World) -> None:
    made = column(world, work(world, side=None))
    assert np.array_equal(made, WITH_SIDE(VECTORS, np.zeros_like(SIDES)))


def test_a_column_of_a_normalised_model_is_normalised(world: World) -> None:
    made = column(world, work(world, normalized=True))
    mapped = WITH_SIDE(VECTORS, SIDES)
    np.testing.assert_allclose(made, mapped / np.linalg.norm(mapped, axis=1, keepdims=True), rtol=1e-6)


def test_an_artifact_that_is_handed_blocks_gets_no_more_rows_than_the_settings_say_in_what_is_quickest(
    world: World,
) -> None:
    world, artifact = World.open(world.store.files.root, block_rows=7), Doubling()
    world.store = replace(world.store, transforms=Transforms(world.store.files, lambda _: artifact))
    QUICK.rows.clear()
    for _ in range(2):
        made = derive(world.store, work(world))
        assert made.computed_in == "doubles"
        found = open_column(world.store.files.path(made.column.name), rows=ROWS, dimension=NEW)
        assert np.array_equal(found, 2 * WITH_SIDE(VECTORS, SIDES))
    assert QUICK.rows == [7, 7, 7, 2] * 2
    assert (artifact.samples, artifact.rows) == ([7], []), "it is found out once"
    world.close()


def test_what_is_quickest_is_asked_again_until_a_sample_tells(world: World) -> None:
    artifact = Doubling()
    store = replace(world.store, transforms=Transforms(world.store.files, lambda _: artifact))
    few = World.open(world.store.files.root, block_rows=4)
    made = derive(replace(store, settings=few.store.settings), work(world))
    assert (made.computed_in, artifact.samples, artifact.rows) == ("float32", [4], [4, 4, 4, 4, 4, 3])
    assert derive(store, work(world)).computed_in == "doubles"
    few.close()


@pytest.mark.parametrize("what", ["source", "side"])
@pytest.mark.parametrize("value", [1.5, np.nan], ids=["a number", "NaN"])
def test_what_comes_of_damaged_bytes_is_told_as_damage_and_leaves_nothing(
    world: World, what: str, value: float
) -> None:
    files, made = world.store.files, work(world)
    damaged: Input = getattr(made, what)
    with files.path(damaged.file).open("r+b") as file:
        file.seek(-4 * damaged.dimension, 2)
        file.write(np.float32(value).tobytes())
    before = stored_files(files.root)
    with pytest.raises(errors.Damaged, match=damaged.file):
        derive(world.store, made)
    assert stored_files(files.root) == before


def test_what_a_transformation_makes_of_sound_bytes_is_its_own_fault(world: World) -> None:
    def load(_: Path) -> Any:
        return lambda embeddings, side=None: np.full((len(embeddings), NEW), np.inf, np.float32)

    world.store = replace(world.store, transforms=Transforms(world.store.files, load))
    with pytest.raises(errors.InvalidVector):
        derive(world.store, work(world))
