"""Which searches are done on the event loop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gallery.arrays import Space
from gallery.index._ivf import IvfIndex
from gallery.index.base import Index
from gallery.index.flat import FlatIndex
from gallery.search.brief import AT_MOST, reads
from gallery.snapshot import Snapshot
from gallery.snapshot import World as Seen
from gallery.spaces import Registry
from tests.gallery.world import GALLERY, OLD, World

SPACE = Space("euclidean", normalized=False)


def snapshot(world: World) -> Snapshot:
    """What a search of the world's gallery sees."""
    return world.galleries.refresh().snapshot(GALLERY)


def grown(seen: Snapshot, rows: int, *, nprobe: int | None = None) -> Snapshot:
    """The same with one segment of so many rows, which nobody reads: exact, or as if in a hundred lists."""
    view = seen.segments[0]
    column = view.columns["old"]
    wide = np.broadcast_to(np.zeros(column.vectors.shape[1], np.float32), (rows, column.vectors.shape[1]))
    index: Index = FlatIndex(wide, SPACE)
    if nprobe is not None:
        index = Listed("ivf", np.zeros((100, wide.shape[1]), np.float32), nprobe=nprobe, vectors=wide, space=SPACE)
    large = replace(column, id=column.id + 1, vectors=wide, index=index)
    return seen.of([replace(view, columns={"old": large}, rows=rows, live=rows)])


def brief(seen: Snapshot, model: str) -> bool:
    """Whether a search of a model is."""
    found = reads(Seen(Registry({}, ()), (0, 0), {seen.gallery: seen}, {}), seen, model)
    return found is not None and found <= AT_MOST


class Listed(IvfIndex):
    """Lists without anything in them."""

    lists = None


def written(world: World, *ids: str) -> Snapshot:
    """What is seen once these items are there."""
    world.upsert("old", list(ids), np.ones((len(ids), OLD), np.float32))
    return snapshot(world)


def test_few_rows_of_the_queries_own_model_are(world: World) -> None:
    assert brief(written(world, "a", "b"), "old")


def test_rows_that_have_to_be_transformed_are_not(world: World) -> None:
    assert not brief(written(world, "a", "b"), "new")


def test_many_rows_are_not_unless_an_index_spares_reading_them(world: World) -> None:
    large = grown(written(world, "a"), 10_000_000)
    assert not brief(large, "old")
    assert brief(grown(large, 10_000_000, nprobe=2), "old")
    assert not brief(grown(large, 10_000_000, nprobe=90), "old")


def test_an_empty_gallery_is(world: World) -> None:
    assert brief(snapshot(world), "new")
