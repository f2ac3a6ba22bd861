"""Several segments under way in one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select, update
from structlog.testing import capture_logs

from gallery import centroids, removal
from gallery.arrays import Vectors
from gallery.catalog.tables import UpgradeSegmentRow
from gallery.catalog.transaction import Catalog, Transaction
from gallery.catalog.upgrades import Lease
from gallery.centroids import Unindexed
from gallery.store import Store
from gallery.transforms import Transforms
from gallery.upgrade import drive, segment
from gallery.upgrade.lanes import Lanes
from gallery.upgrade.states import State
from tests.gallery.world import GALLERY, WITH_SIDE, World, found

SEGMENTS = 5
Seen = Callable[[float], None]


class Waiting(Catalog):
    """Publishes a segment only once something else has happened, or it is clear that it will not."""

    seconds = 20.0

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.something = threading.Event()
        #: of each publication, whether it happened before
        self.happened: list[bool] = []

    @contextmanager
    def transaction(self, name: str = "") -> Iterator[Transaction]:
        """Wait before the transaction is begun: SQLite lets only one write at a time."""
        if name == "publish":
            self.happened.append(self.something.wait(self.seconds))
        with super().transaction(name) as tx:
            yield tx


class Brief(Waiting):
    """Waits for what must not happen."""

    seconds = 0.3


def running(world: World) -> str:
    """An upgrade that runs; every vector of its n-th segment is n times (1, 1, 1, 1)."""
    for number in range(1, SEGMENTS + 1):
        ids = [f"{number}-{row}" for row in range(3)]
        world.upsert("old", ids, np.full((3, 4), number), side=np.zeros((3, 2)))
    upgrade = world.start()
    world.step(upgrade)
    assert world.state(upgrade) is State.RUNNING
    return upgrade


def process(world: World, seen: Seen, *, catalog: type[Catalog] = Catalog, **settings: Any) -> World:
    """Another process, whose transformation tells the segment that it maps."""

    def load(_: Path) -> Any:
        def transform(embeddings: Vectors, side: Vectors | None = None) -> Vectors:
            seen(float(embeddings[0, 0]))
            return WITH_SIDE(embeddings, side)

        return transform

    opened = World.open(world.store.files.root, catalog=catalog, **settings)
    opened.store = replace(opened.store, transforms=Transforms(opened.store.files, load))
    return opened


def lanes(world: World, upgrade: str, more: Callable[[], bool] | None = lambda: True) -> Lanes:
    return Lanes(world.store, upgrade, "worker", published=lambda: None, more=more)


def states(world: World, upgrade: str) -> dict[str, int]:
    """How many segments are in which state."""
    with world.store.catalog.reading() as session:
        rows = session.execute(
            select(UpgradeSegmentRow.state, func.count())
            .where(UpgradeSegmentRow.upgrade_id == upgrade)
            .group_by(UpgradeSegmentRow.state)
        )
        return dict(rows.all())


def die(world: World, upgrade: str) -> Lease:
    """A worker that leases the next segment and is never heard of again."""
    held = segment.lease(world.store, upgrade, "dead")
    assert held is not None
    with world.store.catalog.transaction() as tx:
        long_ago = datetime.now(UTC) - timedelta(hours=1)
        which = (UpgradeSegmentRow.upgrade_id == upgrade, UpgradeSegmentRow.segment_id == held.segment_id)
        tx.session.execute(update(UpgradeSegmentRow).where(*which).values(leased_until=long_ago))
    return held


@pytest.mark.parametrize("later", [2, 3], ids=["the next segment", "the one after it, whose forerunner waits on disk"])
def test_a_later_segment_is_transformed_while_the_first_is_indexed_and_published(world: World, later: int) -> None:
    upgrade = running(world)

    def see(number: float) -> None:
        if number == later:
            waiting.something.set()

    other = process(world, see, catalog=Waiting, segments_at_once=2)
    waiting = other.store.catalog
    assert isinstance(waiting, Waiting)
    assert lanes(other, upgrade).run()
    assert waiting.happened == [True] * SEGMENTS
    assert states(world, upgrade) == {"done": SEGMENTS}
    other.close()


def test_another_segment_is_leased_while_the_last_block_of_one_before_it_is_transformed(world: World) -> None:
    upgrade, seen = running(world), dict[float, int]()

    def see(number: float) -> None:
        deadline = time.monotonic() + 20
        while number == 1 and states(world, upgrade).get("leased", 0) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.setdefault(number, states(world, upgrade).get("leased", 0))

    other = process(world, see, segments_at_once=2)
    assert lanes(other, upgrade).run()
    assert seen[1] == 3
    other.close()


@pytest.mark.parametrize("at_once", [2, 3])
def test_the_first_index_is_built_alone_and_never_more_than_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    upgrade, build = running(world), segment.build
    at_work, guard, most, first = list[int](), threading.Lock(), list[int](), list[int]()

    def counted(*given: Any) -> Any:
        with guard:
            at_work.append(1)
            most.append(len(at_work))
        time.sleep(0.05)
        first.append(len(at_work))
        with guard:
            at_work.pop()
        return build(*given)

    monkeypatch.setattr(segment, "build", counted)
    other = process(world, lambda _: None, segments_at_once=at_once)
    assert lanes(other, upgrade).run()
    assert first[0] == 1, "another would have trained lists of its own"
    assert max(most) <= at_once
    assert states(world, upgrade) == {"done": SEGMENTS}
    other.close()


def test_a_segment_without_an_index_is_not_the_first_that_trains_lists(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for number, rows in enumerate((50, 3000, 3000, 3000)):
        ids, vectors = [f"{number}-{row}" for row in range(rows)], rng.integers(-9, 10, (rows, 4))
        world.upsert("old", ids, vectors, side=rng.integers(-9, 10, (rows, 2)))
    upgrade = world.start()
    world.step(upgrade)
    trained, train = list[int](), centroids.trained

    def counted(store: Store, column: Unindexed, *given: Any) -> Any:
        trained.append(len(column.vectors))
        time.sleep(0.2)  # so long, another could begin
        return train(store, column, *given)

    monkeypatch.setattr(centroids, "trained", counted)
    other = process(world, lambda _: None, segments_at_once=2, exact_below=2000)
    assert lanes(other, upgrade).run()
    assert trained == [3000]
    other.close()


def test_as_many_segments_as_asked_for_are_transformed_at_once_and_each_row_is_once(world: World) -> None:
    upgrade, seen, met = running(world), list[float](), threading.Barrier(3)
    inside, most, guard = set[float](), list[int](), threading.Lock()

    def see(number: float) -> None:
        with guard:
            seen.append(number)
            row = seen.count(number)
            if row < 3:
                inside.add(number)
                most.append(len(inside))
        if number <= 3 and row == 1:
            met.wait(20)
        if row == 2:  # another may begin before the last row is transformed
            with guard:
                inside.remove(number)

    other = process(world, see, segments_at_once=3, block_rows=1)
    assert lanes(other, upgrade).run()
    assert sorted(seen) == [number for number in range(1, SEGMENTS + 1) for _ in range(3)]
    assert max(most) == 3
    assert other.run(upgrade) is State.COMPLETED
    assert len(found(world.search("new", np.zeros((1, 5))))) == 3 * SEGMENTS
    with world.store.catalog.reading() as session:
        assert set(session.scalars(select(UpgradeSegmentRow.attempts))) == {1}
    other.close()


def test_a_lane_that_waits_holds_no_lease(world: World) -> None:
    upgrade, leased, met = running(world), list[int](), threading.Barrier(3)

    def see(number: float) -> None:
        if number <= 3 and not met.broken and len(leased) < 3:
            leased.append(states(world, upgrade).get("leased", 0))
            met.wait(20)

    other = process(world, see, segments_at_once=3, block_rows=1)
    assert lanes(other, upgrade).run()
    assert max(leased) == 3, "the fourth lane waits, and other workers may have the segments"
    other.close()


def test_a_segment_that_may_have_killed_its_worker_takes_no_other_along(world: World) -> None:
    """It waits until those before it are published, and those after it wait until it is."""
    upgrade = running(world)
    first, second = (segment.lease(world.store, upgrade, "worker") for _ in range(2))
    die(world, upgrade)
    for held in (first, second):
        assert held is not None
        segment.release(world.store, held)

    def see(number: float) -> None:
        if number >= 3:
            waiting.something.set()
        deadline = time.monotonic() + 0.3
        while number <= 3 and (leased := states(world, upgrade)["leased"] - 1) == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        if number == 3:
            beside.append(leased)

    other, beside = process(world, see, catalog=Brief, segments_at_once=3), list[int]()
    waiting = other.store.catalog
    assert isinstance(waiting, Brief)
    assert lanes(other, upgrade).run()
    assert waiting.happened[:2] == [False, False]
    assert beside == [0]
    assert states(world, upgrade) == {"done": SEGMENTS}
    other.close()


def test_a_segment_is_done_alone_once_it_was_begun_before_or_a_part_of_the_time_is_asked_for(world: World) -> None:
    upgrade = running(world)
    first = die(world, upgrade)
    again = segment.lease(world.store, upgrade, "worker")
    assert again is not None
    assert (first.alone, again.alone, again.segment_id) == (False, True, first.segment_id)
    world.make("half")
    world.upsert("old", ["x"], np.ones((1, 4)), side=np.zeros((1, 2)), gallery="half")
    throttled = world.start(gallery="half", throttle={"duty_cycle": 0.5})
    world.step(throttled)
    held = segment.lease(world.store, throttled, "worker")
    assert held is not None
    assert held.alone


def test_what_goes_wrong_with_one_segment_does_not_stop_the_others(world: World) -> None:
    upgrade = running(world)

    def see(number: float) -> None:
        if number == 2:
            raise RuntimeError("it cannot be mapped")

    other = process(world, see, segments_at_once=2, max_attempts=1)
    assert lanes(other, upgrade).run()
    assert states(world, upgrade) == {"done": SEGMENTS - 1, "failed": 1}
    assert not lanes(other, upgrade).run()
    assert world.run(upgrade) is State.FAILED
    other.close()


def test_lanes_end_with_the_segments_that_they_are_at_when_no_more_are_wanted(world: World) -> None:
    upgrade = running(world)
    other = process(world, lambda _: None, segments_at_once=2)
    assert lanes(other, upgrade, more=lambda: False).run()
    done = states(world, upgrade)["done"]
    assert 1 <= done <= 3, "as many lanes as segments at once, and one whose column waits for its index"
    assert states(world, upgrade) == {"done": done, "pending": SEGMENTS - done}
    assert lanes(other, upgrade, more=None).run()
    assert states(world, upgrade) == {"done": done + 1, "pending": SEGMENTS - done - 1}
    other.close()


def test_a_process_that_is_told_to_end_gives_back_what_it_was_at_and_no_lane_goes_on(world: World) -> None:
    upgrade = running(world)

    def see(_: float) -> None:
        raise SystemExit

    other = process(world, see, segments_at_once=2)
    with pytest.raises(SystemExit):
        lanes(other, upgrade).run()
    assert states(world, upgrade) == {"pending": SEGMENTS}
    with world.store.catalog.reading() as session:
        assert set(session.scalars(select(UpgradeSegmentRow.attempts))) == {0}
    other.close()


def test_a_gallery_that_is_deleted_while_it_is_upgraded_is_no_failure_of_its_segments(world: World) -> None:
    upgrade = running(world)
    other = process(world, lambda _: removal.delete_gallery(world.store, GALLERY))
    with capture_logs() as logs:
        lanes(other, upgrade, more=None).run()
    assert not logs
    assert states(world, upgrade) == {}
    other.close()


def test_a_step_of_a_worker_goes_on_as_long_as_it_may(world: World) -> None:
    upgrade = running(world)
    calls = iter([True, True, True, True, False])

    def advance(more: Callable[[], bool] | None) -> bool:
        return drive.advance(world.store, world.galleries, world.searcher, upgrade, "worker", more)

    assert advance(None)
    assert states(world, upgrade) == {"done": 1, "pending": SEGMENTS - 1}
    assert advance(lambda: next(calls))
    assert states(world, upgrade) == {"done": SEGMENTS}
