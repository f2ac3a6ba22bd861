"""The work on one segment: heartbeats, and transformations that misbehave."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from gallery import errors, repair, verify
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ColumnRow, UpgradeSegmentRow
from gallery.catalog.transaction import Catalog, Transaction
from gallery.catalog.upgrades import Lease
from gallery.transforms import Transforms
from gallery.upgrade import lifecycle, segment
from gallery.upgrade.states import State
from tests.gallery.crash import stored_files
from tests.gallery.world import WITH_SIDE, World, found, work

VECTORS, SIDE = np.ones((2, 4)), np.ones((2, 2))


class Flaky(Catalog):
    """Cannot be reached by the first heartbeat, and tells when a later one was."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.failed = False
        self.renewed = threading.Event()

    @contextmanager
    def transaction(self, name: str = "") -> Iterator[Transaction]:
        """Fail once, in the heartbeat's thread."""
        beating = threading.current_thread().name.startswith("lease-")
        if beating and not self.failed:
            self.failed = True
            raise OperationalError("UPDATE", {}, ConnectionError("gone for a moment"))
        with super().transaction(name) as tx:
            yield tx
        if beating:
            self.renewed.set()


def leased(world: World) -> tuple[str, Lease]:
    """An upgrade that runs, and a lease of its first segment."""
    world.upsert("old", ["a", "b"], VECTORS, side=SIDE)
    upgrade = world.start()
    world.step(upgrade)
    held = segment.lease(world.store, upgrade, "worker")
    assert held is not None
    return upgrade, held


def test_a_heartbeat_outlives_a_database_that_is_gone_for_a_moment(world: World, tmp_path: Path) -> None:
    upgrade, held = leased(world)
    flaky = World.open(tmp_path / "data", catalog=Flaky, lease_seconds=0.3)
    with flaky.store.catalog.reading() as session:
        before = session.get_one(UpgradeSegmentRow, (upgrade, held.segment_id)).leased_until
    with segment.renewed(flaky.store, held):
        assert isinstance(flaky.store.catalog, Flaky)
        assert flaky.store.catalog.renewed.wait(20)
    with flaky.store.catalog.reading() as session:
        assert session.get_one(UpgradeSegmentRow, (upgrade, held.segment_id)).leased_until != before
    work(flaky.store, held)
    flaky.close()


def test_a_lease_that_is_given_back_is_free_at_once_and_no_attempt(world: World) -> None:
    upgrade, held = leased(world)
    segment.release(world.store, held)
    again = segment.lease(world.store, upgrade, "another")
    assert again is not None
    assert again.fence == held.fence + 1
    with world.store.catalog.reading() as session:
        assert session.get_one(UpgradeSegmentRow, (upgrade, held.segment_id)).attempts == 1
    with pytest.raises(errors.LeaseLost):
        segment.release(world.store, held)


def broken(world: World, spoil: Any) -> World:
    """The world of a process whose transformation does something else."""

    def load(_: Path) -> Any:
        return lambda embeddings, side=None: spoil(WITH_SIDE(embeddings, side))

    store = world.store
    spoilt = World.open(store.files.root, max_attempts=1)
    transforms = Transforms(spoilt.store.files, load)
    spoilt.store = type(store)(spoilt.store.catalog, spoilt.store.files, transforms, spoilt.store.settings)
    return spoilt


def with_nan(mapped: Any) -> Any:
    """One number is spoilt."""
    mapped[-1, 0] = np.nan
    return mapped


def crash(_: Any) -> Any:
    """What a tensor library does with a shape that it does not like."""
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (with_nan, "gives no finite vectors of dimension 5"),
        (lambda mapped: mapped[:, :3], "gives no finite vectors of dimension 5"),
        (crash, "cannot map stored vectors of old: RuntimeError"),
    ],
    ids=["nan", "narrow", "raises"],
)
def test_a_transformation_that_misbehaves_fails_the_upgrade_before_the_first_write(
    world: World, spoil: Any, says: str
) -> None:
    world.upsert("old", ["a", "b"], VECTORS, side=SIDE)
    upgrade = world.start()
    spoilt = broken(world, spoil)
    assert spoilt.run(upgrade) is State.FAILED
    assert says in (world.error(upgrade) or "")
    spoilt.close()


def test_a_segment_whose_vectors_come_out_as_nan_is_set_aside_and_nothing_of_it_is_published(world: World) -> None:
    upgrade, held = leased(world)
    segment.release(world.store, held)
    files = stored_files(world.store.files.root)
    spoilt = broken(world, with_nan)
    assert spoilt.run(upgrade) is State.FAILED
    assert stored_files(world.store.files.root) == files
    spoilt.close()
    lifecycle.retry(world.store, upgrade)
    assert world.run(upgrade) is State.COMPLETED
    assert found(world.search("new", np.zeros((1, 5)))).keys() == {"a", "b"}


def test_a_segment_that_lost_its_new_column_is_found_before_the_upgrade_completes(world: World) -> None:
    world.upsert("old", ["a", "b"], VECTORS, side=SIDE)
    upgrade = world.start()
    while world.state(upgrade) is not State.VERIFYING:
        world.step(upgrade)
    with world.store.catalog.transaction() as tx:  # every count says that all is done
        column = tx.session.scalars(select(ColumnRow).where(ColumnRow.origin == "derived")).one()
        segment_id = column.segment_id
        tx.session.delete(column)
    assert world.run(upgrade) is State.FAILED
    assert world.error(upgrade) == f"segments [{segment_id}] have no column of new"


def test_what_float16_cannot_hold_is_not_published_as_infinity(world: World) -> None:
    world.make("half", storage_dtype="float16")
    with pytest.raises(errors.InvalidVector, match="65504"):
        world.upsert("old", ["a"], [[70_000, 0, 0, 0]], side=[[1, 1]], gallery="half")
    world.upsert("old", ["a"], [[1, 0, 0, 60_000]], side=[[60_000, -60_000]], gallery="half")
    upgrade = world.start(gallery="half")
    assert world.run(upgrade) is State.FAILED
    assert found(world.search("old", np.zeros((1, 4)), gallery="half")).keys() == {"a"}


def test_a_direction_that_float16_cannot_hold_is_refused_where_it_is_all_that_counts(world: World) -> None:
    world.register("direction", 4, "cosine")
    for name, model in (("turned", "direction"), ("half", "old")):
        world.make(name, model=model, storage_dtype="float16")
    tiny = [[0, 1, 0, 0], [2e-8, 0, 0, 0]]
    with pytest.raises(errors.InvalidVector, match="unit length") as refused:
        world.upsert("direction", ["a", "b"], tiny, gallery="turned")
    assert refused.value.pointer == "/items/1/embedding"
    world.upsert("old", ["a", "b"], tiny, gallery="half")


def test_an_item_that_cannot_be_upgraded_is_named_and_once_it_is_deleted_holds_nothing_up(world: World) -> None:
    world.make("half", storage_dtype="float16")
    items = ["a", "bad", "c"]
    side = [[1, 1], [60_000, -60_000], [1, 1]]
    world.upsert("old", items, [[1, 0, 0, 0], [1, 0, 0, 60_000], [0, 1, 0, 0]], side=side, gallery="half")
    upgrade = world.start(gallery="half")
    assert world.run(upgrade) is State.FAILED
    with world.store.catalog.reading() as session:
        (failure,) = upgrade_rows.failures(session, upgrade)
    assert "item 'bad': the vector of row 1 is NaN or infinite when stored as float16" in (failure.error or "")
    world.delete("bad", gallery="half")
    lifecycle.retry(world.store, upgrade)
    assert world.run(upgrade) is State.COMPLETED
    assert found(world.search("new", np.zeros((1, 5)), gallery="half")).keys() == {"a", "c"}
    assert not verify.gallery(world.store.catalog, world.store.files, "half").problems
    with world.store.catalog.reading() as session:
        name = session.scalars(select(ColumnRow.file).where(ColumnRow.origin == "derived")).one()
    world.store.files.path(name).unlink()
    assert repair.file(world.store, name) is not None
    assert not verify.gallery(world.store.catalog, world.store.files, "half").problems


def test_what_comes_without_side_information_while_an_upgrade_that_skips_such_is_verified_stops_it_not(
    world: World,
) -> None:
    world.upsert("old", ["a", "b"], VECTORS, side=SIDE)
    upgrade = world.start(on_missing_side_information="skip")
    while world.state(upgrade) is not State.VERIFYING:
        assert world.step(upgrade)
    world.upsert("old", ["bare"], VECTORS[:1])
    assert world.run(upgrade) is State.COMPLETED
