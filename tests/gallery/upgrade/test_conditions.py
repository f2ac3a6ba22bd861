"""Whatever keeps an upgrade from going at full speed is told, with a reason that a person understands."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from sqlalchemy import select

from gallery import errors, faults
from gallery.catalog import latencies
from gallery.catalog.tables import ColumnRow
from gallery.catalog.upgrades import upgrade_row
from gallery.upgrade import drive, lifecycle, moves, segment
from gallery.upgrade.progress import Condition, Progress, conditions, progress
from gallery.upgrade.states import State
from tests.gallery.world import World, work


@pytest.fixture
def filled(world: World) -> World:
    """Three segments."""
    for row in range(3):
        world.upsert("old", [f"i{row}"], np.ones((1, 4)), side=np.ones((1, 2)))
    return world


@pytest.fixture(autouse=True)
def clock() -> Iterator[None]:
    """Goes right again at the end."""
    yield
    faults.arm(None)


def told(world: World, upgrade: str, *, later: float = 0) -> list[Condition]:
    """What the document says, now or so many seconds later."""
    faults.arm(f"clock:{later}")
    with world.store.catalog.reading() as session:
        return conditions(session, upgrade_row(session, upgrade))


def until(world: World, upgrade: str, state: State) -> None:
    while world.state(upgrade) is not state:
        assert world.step(upgrade)


def test_an_upgrade_that_goes_at_full_speed_has_nothing_to_tell(filled: World) -> None:
    upgrade = filled.start()
    assert told(filled, upgrade) == []
    while world_goes(filled, upgrade):
        assert told(filled, upgrade) == []
    assert told(filled, upgrade, later=3600) == []


def world_goes(world: World, upgrade: str) -> bool:
    faults.arm(None)
    return world.step(upgrade)


def validating(world: World, upgrade: str) -> None:
    """A worker died as it measured."""
    with world.store.catalog.transaction() as tx:
        moves.move(tx.session, upgrade_row(tx.session, upgrade), State.VALIDATING)


def one_is_done(world: World, upgrade: str) -> None:
    until(world, upgrade, State.RUNNING)
    world.step(upgrade)


def all_are_done(world: World, upgrade: str) -> None:
    until(world, upgrade, State.RUNNING)
    for _ in range(3):
        world.step(upgrade)
    assert world.state(upgrade) is State.RUNNING


def verifying(world: World, upgrade: str) -> None:
    until(world, upgrade, State.VERIFYING)


def pending(world: World, upgrade: str) -> None:
    """Nobody has looked at it."""


@pytest.mark.parametrize("until_then", [pending, validating, one_is_done, all_are_done, verifying])
def test_where_no_worker_goes_on_it_has_stalled_in_whatever_state_that_is(filled: World, until_then: object) -> None:
    upgrade = filled.start()
    assert callable(until_then)
    until_then(filled, upgrade)
    assert told(filled, upgrade) == []
    (condition,) = told(filled, upgrade, later=20)
    assert (condition.type, condition.reason) == ("stalled", "no_worker")
    assert "is one running?" in condition.detail


def test_nobody_knows_when_an_upgrade_is_done_that_no_worker_goes_on_with(filled: World) -> None:
    upgrade = filled.start()
    one_is_done(filled, upgrade)
    assert eta(filled, upgrade) is not None
    faults.arm("clock:20")
    assert eta(filled, upgrade) is None
    with filled.store.catalog.reading() as session:
        assert [each.type for each in conditions(session, upgrade_row(session, upgrade))] == ["stalled"]


def test_a_worker_that_is_at_a_segment_has_not_stalled(filled: World) -> None:
    upgrade = filled.start()
    all_but_one_are_done(filled, upgrade)
    held = segment.lease(filled.store, upgrade, "slow")
    assert held is not None
    assert told(filled, upgrade, later=20) == []
    (condition,) = told(filled, upgrade, later=3600)  # by then nobody has renewed the lease
    assert condition.type == "stalled"


def test_nor_has_one_whose_other_segments_wait_for_the_one_worker_that_there_is(filled: World) -> None:
    upgrade = filled.start()
    until(filled, upgrade, State.RUNNING)
    assert segment.lease(filled.store, upgrade, "slow") is not None
    assert told(filled, upgrade, later=20) == []


def all_but_one_are_done(world: World, upgrade: str) -> None:
    until(world, upgrade, State.RUNNING)
    for _ in range(2):
        world.step(upgrade)


def test_who_paused_it_is_named(filled: World) -> None:
    upgrade = filled.start()
    lifecycle.pause(filled.store, upgrade, actor="night-shift")
    (condition,) = told(filled, upgrade)
    assert (condition.type, condition.reason) == ("paused", "requested")
    assert "paused by night-shift; resume it" in condition.detail
    lifecycle.resume(filled.store, upgrade)
    lifecycle.pause(filled.store, upgrade)
    (condition,) = told(filled, upgrade)
    assert "night-shift" not in condition.detail


def test_slow_searches_hold_it_back_with_their_number_until_they_are_fast_again(filled: World) -> None:
    upgrade = filled.start(throttle={"max_search_p99_ms": 50})
    until(filled, upgrade, State.RUNNING)
    for p99, held in ((62.0, True), (49.0, False)):
        with filled.store.catalog.transaction() as tx:
            latencies.publish(tx.session, "api", {1: p99})
        assert filled.step(upgrade) is not held
        assert [each.detail for each in told(filled, upgrade)] == (
            ["p99 62 ms > 50 ms: no segment starts until searches are faster"] if held else []
        )
        assert (drive.due(filled.store) == []) is held


def test_the_time_that_is_left_is_that_of_the_throttle_and_unknown_where_nobody_knows(filled: World) -> None:
    upgrade = filled.start(throttle={"items_per_second": 0.01})
    until(filled, upgrade, State.RUNNING)
    assert not filled.step(upgrade)
    assert [(each.type, each.reason) for each in told(filled, upgrade)] == [("throttled", "items_per_second")]
    assert eta(filled, upgrade) is None  # nothing is done yet
    lifecycle.change_throttle(filled.store, upgrade, {"items_per_second": None})
    filled.step(upgrade)
    lifecycle.change_throttle(filled.store, upgrade, {"items_per_second": 0.01})
    assert eta(filled, upgrade) == 200  # 2 items, although the first took no time
    lifecycle.change_throttle(filled.store, upgrade, {"items_per_second": None, "max_search_p99_ms": 50})
    found = eta(filled, upgrade)
    assert found is not None
    assert found < 60
    with filled.store.catalog.transaction() as tx:
        latencies.publish(tx.session, "api", {1: 62.0})
    assert eta(filled, upgrade) is None


def eta(world: World, upgrade: str) -> float | None:
    return counted(world, upgrade).eta_seconds


def counted(world: World, upgrade: str) -> Progress:
    with world.store.catalog.reading() as session:
        return progress(session, upgrade_row(session, upgrade))


def test_an_hour_of_pause_is_no_work_but_the_segment_that_was_under_way_then_is(each_world: World) -> None:
    for row in range(4):
        each_world.upsert("old", [f"i{row}"], np.ones((1, 4)), side=np.ones((1, 2)))
    upgrade = each_world.start()
    one_is_done(each_world, upgrade)
    for hours in (1, 2):
        lifecycle.pause(each_world.store, upgrade)
        faults.arm(f"clock:{hours * 3600}")
        lifecycle.resume(each_world.store, upgrade)
        assert (eta(each_world, upgrade) or 3600) < 600
        each_world.step(upgrade)
        assert (eta(each_world, upgrade) or 3600) < 600
    held = segment.lease(each_world.store, upgrade, "slow")
    assert held is not None
    lifecycle.pause(each_world.store, upgrade)
    faults.arm("clock:10800")
    work(each_world.store, held)
    faults.arm("clock:14400")
    lifecycle.resume(each_world.store, upgrade)
    assert each_world.run(upgrade) is State.COMPLETED
    assert 3600 < 4 / (counted(each_world, upgrade).items_per_second or 1) < 4200


def with_a_poisoned_segment(world: World) -> str:
    """An upgrade whose first segment failed as often as it may."""
    upgrade = world.start()
    until(world, upgrade, State.RUNNING)
    for _ in range(world.store.settings.max_attempts):
        held = segment.lease(world.store, upgrade, "poisoned")
        assert held is not None
        segment.fail(world.store, held, "OSError: a bad sector")
    return upgrade


def test_a_retry_does_what_failed_and_nothing_else(filled: World) -> None:
    upgrade = with_a_poisoned_segment(filled)
    assert filled.run(upgrade) is State.FAILED
    done = made(filled)
    lifecycle.retry(filled.store, upgrade)
    assert filled.run(upgrade) is State.COMPLETED
    assert made(filled).items() > done.items()
    assert len(made(filled)) == len(done) + 1 == 3


def made(world: World) -> dict[int, str]:
    """By segment, the file of its derived column."""
    with world.store.catalog.reading() as session:
        rows = session.scalars(select(ColumnRow).where(ColumnRow.origin == "derived"))
        return {row.segment_id: row.file for row in rows}


def test_segments_that_were_set_aside_are_told_with_the_error_while_the_rest_goes_on(filled: World) -> None:
    upgrade = with_a_poisoned_segment(filled)
    (condition,) = told(filled, upgrade)
    assert (condition.type, condition.reason) == ("segments_failed", "attempts_exhausted")
    assert condition.detail == "OSError: a bad sector; see .../failures"
    assert filled.run(upgrade) is State.FAILED
    assert [each.reason for each in told(filled, upgrade)] == ["segments_failed", "attempts_exhausted"]
    with pytest.raises(errors.InvalidStateTransition) as refused:
        lifecycle.pause(filled.store, upgrade)
    assert refused.value.details["allowed"] == ["resume", "cancel", "retry"]


def test_the_throttle_of_an_upgrade_that_is_over_changes_no_more(filled: World) -> None:
    upgrade = filled.start()
    lifecycle.cancel(filled.store, upgrade)
    with pytest.raises(errors.InvalidStateTransition) as refused:
        lifecycle.change_throttle(filled.store, upgrade, {"items_per_second": 1})
    assert refused.value.details["allowed"] == []
    with filled.store.catalog.reading() as session:
        assert upgrade_row(session, upgrade).throttle == {}
