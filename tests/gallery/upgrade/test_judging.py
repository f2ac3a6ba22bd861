"""Whether an upgrade may begin, or complete, is found out by one worker, who can be told to stop in the middle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from gallery import faults
from gallery.catalog import probes
from gallery.catalog.galleries import gallery_row
from gallery.catalog.upgrades import upgrade_row
from gallery.heartbeat import Stopped
from gallery.upgrade import drive, lifecycle
from gallery.upgrade.progress import Condition, conditions
from gallery.upgrade.states import State
from tests.gallery.world import GALLERY, PLAIN, World

#: a state in which a worker judges, and the one that comes after it
JUDGED = pytest.mark.parametrize(
    ("state", "then"), [(State.VALIDATING, State.RUNNING), (State.VERIFYING, State.COMPLETED)]
)


@pytest.fixture
def filled(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    """Three segments and a probe, and leases that are short enough for a test to see them renewed, unless it says how long."""
    opened = World.open(tmp_path / "data", lease_seconds=getattr(request, "param", 0.3)).prepare(
        ("forward", "old", "new", PLAIN)
    )
    for row in range(3):
        opened.upsert("old", [f"i{row}"], np.eye(1, 4, row))
    probe = {"old": np.ones(4, np.float32), "new": np.ones(5, np.float32)}
    with opened.store.catalog.transaction() as tx:
        probes.replace(tx.session, gallery_row(tx.session, GALLERY).id, [(probe, None)])
    yield opened
    faults.arm(None)
    opened.close()


def judge(world: World, upgrade: str, between: Callable[[], None], owner: str = "one") -> bool:
    """A step of a worker that does something in between."""
    return drive.advance(world.store, world.galleries, world.searcher, upgrade, owner, between=between)


def before(world: World, state: State) -> str:
    """An upgrade that a worker is to judge."""
    upgrade = world.start()
    while state is State.VERIFYING and world.state(upgrade) is not state:
        assert world.step(upgrade)
    return upgrade


def stopped() -> None:
    raise Stopped


@JUDGED
def test_a_worker_that_is_told_to_stop_gives_it_up_at_once_and_any_other_may_take_it(
    filled: World, state: State, then: State
) -> None:
    upgrade = before(filled, state)
    assert not judge(filled, upgrade, stopped)
    assert (filled.state(upgrade), filled.error(upgrade)) == (state, None)
    assert drive.due(filled.store) == [upgrade]
    assert filled.step(upgrade, "another")
    assert filled.state(upgrade) is then


@JUDGED
def test_while_one_worker_is_at_it_no_other_has_anything_to_do_and_it_has_not_stalled(
    filled: World, state: State, then: State
) -> None:
    upgrade, seen = before(filled, state), list[object]()

    def look() -> None:
        if not seen:
            threading.Event().wait(2 * filled.store.settings.lease_seconds)  # which is renewed meanwhile
            seen.append(drive.due(filled.store))
            seen.append(filled.step(upgrade, "another"))
            with filled.store.catalog.transaction() as tx:
                row = upgrade_row(tx.session, upgrade)
                row.state_since = row.state_since.replace(year=2020)
                seen.append(conditions(tx.session, row))

    assert judge(filled, upgrade, look)
    assert seen == [[], False, []]
    assert filled.state(upgrade) is then


@JUDGED
def test_what_waits_meanwhile_says_for_which_upgrade(filled: World, state: State, then: State) -> None:
    filled.make("another")
    filled.upsert("old", ["a"], np.ones((1, 4)), gallery="another")
    upgrade, waits, told = before(filled, state), filled.start(gallery="another"), list[Condition]()

    def look() -> None:
        with filled.store.catalog.reading() as session:
            row = upgrade_row(session, waits)
            row.state_since -= timedelta(hours=1)
            told[:] = conditions(session, row)

    assert judge(filled, upgrade, look)
    assert [(each.type, each.reason) for each in told] == [("stalled", "workers_busy")]
    assert f"a worker is at the upgrade of {GALLERY}" in told[0].detail


@JUDGED
@pytest.mark.parametrize("filled", [30.0], indirect=True)  # so long that none is renewed by one who is thought dead
def test_one_that_died_at_it_is_followed_by_another_once_its_lease_has_run_out(
    filled: World, state: State, then: State
) -> None:
    upgrade = before(filled, state)

    def dies() -> None:
        """Nothing of it is done any more, so it does not even give up what it holds."""
        faults.arm("clock:31")  # later than its lease lasts
        assert drive.due(filled.store) == [upgrade]
        assert filled.step(upgrade, "another")
        raise Stopped

    assert not judge(filled, upgrade, dies)
    assert filled.state(upgrade) is then


@JUDGED
def test_one_that_was_given_up_has_stalled_only_once_nobody_took_it_for_a_while(
    filled: World, state: State, then: State
) -> None:
    upgrade = before(filled, state)
    assert not judge(filled, upgrade, stopped)
    with filled.store.catalog.reading() as session:
        row = upgrade_row(session, upgrade)
        row.state_since -= timedelta(hours=1)
        assert conditions(session, row) == []
        assert row.leased_until is not None
        row.leased_until -= timedelta(minutes=1)
        (stalled,) = conditions(session, row)
    assert (stalled.type, stalled.since) == ("stalled", row.leased_until)
    assert filled.step(upgrade, "another")
    assert filled.state(upgrade) is then


@JUDGED
def test_what_is_cancelled_is_not_judged_to_its_end(filled: World, state: State, then: State) -> None:
    upgrade, calls = before(filled, state), 0

    def cancel() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            lifecycle.cancel(filled.store, upgrade)
            threading.Event().wait(filled.store.settings.lease_seconds)

    assert not judge(filled, upgrade, cancel)
    assert (filled.state(upgrade), calls) == (State.CANCELLED, 1)
