"""What decides the order of the work is measured before the first segment is leased, whoever dies meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from gallery import errors, faults, removal
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ArtifactRow, SegmentRow, UpgradeSegmentRow
from gallery.search.hits import Hits
from gallery.store import Store
from gallery.transforms import Transforms
from gallery.upgrade import order
from gallery.upgrade.plan import Order
from gallery.upgrade.states import State
from tests.gallery.crash import Bomb, Killed, Stage, leases_run_out
from tests.gallery.world import GALLERY, OLD, PLAIN, WITH_SIDE, Linear, World

#: the log-variance of an item is the first number of its embedding
CERTAIN = Linear(PLAIN.embedding, head=[1, 0, 0, 0])
CERTAIN_WITH_SIDE = Linear(WITH_SIDE.embedding, WITH_SIDE.side, head=[1, 0, 0, 0])


def put(world: World, name: str, *log_variances: float, **more: Any) -> None:
    """One segment, whose rows are predicted to have these log-variances."""
    vectors = np.zeros((len(log_variances), OLD), np.float32)
    vectors[:, 0] = log_variances
    world.upsert("old", [f"{name}{row}" for row in range(len(vectors))], vectors, **more)


def uncertain(world: World) -> World:
    """Three segments, the least certain in the middle and the most certain first."""
    world.transformation("certain", "old", "new", CERTAIN)
    put(world, "a", 1, 1)
    put(world, "b", 9, 3)
    put(world, "c", 2, 4)
    return world


def positions(world: World, upgrade: str) -> list[int]:
    """The segments in the order of the work."""
    with world.store.catalog.reading() as session:
        work = select(UpgradeSegmentRow.segment_id).where(UpgradeSegmentRow.upgrade_id == upgrade)
        return list(session.scalars(work.order_by(UpgradeSegmentRow.position)))


def done(world: World, upgrade: str) -> list[int]:
    """Run the upgrade to its end; the segments as they were done."""
    segments: list[int] = []
    while world.step(upgrade):
        with world.store.catalog.reading() as session:
            now = {row.segment_id for row in upgrade_rows.in_state(session, upgrade, "done")}
        segments += sorted(now - set(segments))
    assert world.state(upgrade) is State.COMPLETED, world.error(upgrade)
    return segments


def report(world: World, upgrade: str) -> Any:
    """What validation found."""
    with world.store.catalog.reading() as session:
        return upgrade_rows.upgrade_row(session, upgrade).report


def test_the_least_certain_segment_is_transformed_first(each_world: World) -> None:
    upgrade = uncertain(each_world).start("certain", order=Order.UNCERTAINTY)
    assert done(each_world, upgrade) == [2, 3, 1]
    assert report(each_world, upgrade)["first_segments"] == [
        {"segment": 2, "items": 2, "uncertainty": 6.0},
        {"segment": 3, "items": 2, "uncertainty": 3.0},
        {"segment": 1, "items": 2, "uncertainty": 1.0},
    ]


def test_another_order_leaves_the_segments_as_they_are_stored_and_says_nothing(world: World) -> None:
    upgrade = uncertain(world).start("certain")
    assert done(world, upgrade) == [1, 2, 3]
    assert "first_segments" not in report(world, upgrade)


def test_a_dry_run_reports_the_order_and_transforms_nothing(world: World) -> None:
    upgrade = uncertain(world).start("certain", order=Order.UNCERTAINTY, dry_run=True)
    assert world.run(upgrade) is State.COMPLETED
    assert [each["segment"] for each in report(world, upgrade)["first_segments"]] == [2, 3, 1]
    assert world.search("old", np.zeros((1, OLD))).coverage.direct == 6


def test_deleted_items_have_no_say(world: World) -> None:
    uncertain(world).delete("b0", "c0")
    upgrade = world.start("certain", order=Order.UNCERTAINTY)
    assert done(world, upgrade) == [3, 2, 1]
    assert [each["uncertainty"] for each in report(world, upgrade)["first_segments"]] == [4.0, 3.0, 1.0]


def test_a_large_segment_is_judged_by_rows_that_lie_evenly(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "SAMPLE_ROWS", 4)
    world.transformation("certain", "old", "new", CERTAIN)
    put(world, "large", *range(10))
    put(world, "small", 3, 5, 4, 4)
    put(world, "cut", 0, 1, 8, 3, 4, 8, 6)
    world.delete("cut2", "cut5")
    upgrade = world.start("certain", order=Order.UNCERTAINTY)
    done(world, upgrade)
    assert {each["segment"]: each["uncertainty"] for each in report(world, upgrade)["first_segments"]} == {
        1: np.mean([0, 3, 6, 9]),
        2: 4.0,
        3: np.mean([0, 3, 6]),
    }


@pytest.mark.parametrize(("policy", "expected"), [("zeros", [2, 1]), ("skip", [1, 2])])
def test_a_segment_without_side_information_is_predicted_with_zeros_or_goes_last_if_it_is_skipped(
    world: World, policy: Any, expected: list[int]
) -> None:
    world.transformation("certain", "old", "new", CERTAIN_WITH_SIDE)
    put(world, "with", 1, side=np.ones((1, 2)))
    put(world, "without", 5)
    upgrade = world.start("certain", order=Order.UNCERTAINTY, on_missing_side_information=policy)
    world.step(upgrade)
    assert positions(world, upgrade) == expected
    told = report(world, upgrade)["first_segments"]
    assert [each["uncertainty"] for each in told] == ([5.0, 1.0] if policy == "zeros" else [1.0, None])


def test_what_is_written_while_it_runs_goes_last_however_uncertain(world: World) -> None:
    upgrade = uncertain(world).start("certain", order=Order.UNCERTAINTY)
    world.step(upgrade)
    put(world, "late", 99)
    assert done(world, upgrade) == [2, 3, 1, 4]


def test_what_is_written_before_a_worker_looks_has_its_place(world: World) -> None:
    upgrade = uncertain(world).start("certain", order=Order.UNCERTAINTY)
    put(world, "late", 99)
    assert done(world, upgrade) == [4, 2, 3, 1]


def test_a_transformation_without_a_head_is_refused_at_once(world: World) -> None:
    put(world, "a", 1, side=np.ones((1, 2)))
    with pytest.raises(errors.WrongTransformation, match="predicts no uncertainty") as refused:
        world.start("forward", order=Order.UNCERTAINTY)
    assert refused.value.pointer == "/order"
    world.start("forward", order=Order.MOST_SEARCHED)


def test_where_the_catalog_does_not_know_of_the_head_the_worker_finds_out(world: World) -> None:
    put(world, "a", 1, side=np.ones((1, 2)))
    with world.store.catalog.transaction() as tx:
        for row in tx.session.scalars(select(ArtifactRow)):
            row.architecture = {name: value for name, value in row.architecture.items() if name != "uncertainty"}
    upgrade = world.start("forward", order=Order.UNCERTAINTY)
    assert world.run(upgrade) is State.FAILED
    assert "predicts no uncertainty" in (world.error(upgrade) or "")


def test_a_prediction_that_is_no_number_fails_the_upgrade_before_the_first_write(world: World) -> None:
    upgrade = uncertain(world).start("certain", order=Order.UNCERTAINTY)

    class Mad(Linear):
        def uncertainty(self, embeddings: Any, side: Any = None) -> Any:
            return np.full(len(embeddings), np.nan, np.float32)

    world.store = replaced(world.store, lambda _: Mad(CERTAIN.embedding))
    assert world.run(upgrade) is State.FAILED
    assert "predicts an uncertainty of nan for segment 1" in (world.error(upgrade) or "")
    assert positions(world, upgrade) == [1, 2, 3]


def test_a_worker_that_comes_too_late_with_its_measure_changes_nothing(world: World, tmp_path: Path) -> None:
    upgrade = uncertain(world).start("certain", order=Order.UNCERTAINTY)
    first = World.open(tmp_path / "data")
    ran: list[State] = []

    class Slow(Linear):
        """While it predicts, its lease runs out and another worker does everything; and what it predicts is the contrary."""

        def uncertainty(self, embeddings: Any, side: Any = None) -> Any:
            if not ran:
                faults.arm("clock:3600")
                ran.append(first.run(upgrade))
                faults.arm(None)
            return -np.asarray(embeddings)[:, 0]

    world.store = replaced(world.store, lambda _: Slow(CERTAIN.embedding))
    assert not world.step(upgrade)
    assert ran == [State.COMPLETED]
    assert positions(world, upgrade) == [2, 3, 1]
    assert report(world, upgrade)["first_segments"][0]["uncertainty"] == 6.0
    first.close()


def replaced(store: Store, load: Callable[[Path], Any]) -> Store:
    """The same store in a process whose artifacts behave otherwise."""
    return Store(store.catalog, store.files, Transforms(store.files, load), store.settings)


@pytest.mark.parametrize("unwinds", [False, True], ids=["killed", "interrupted"])
def test_whenever_a_worker_dies_as_it_measures_the_next_one_has_the_same_order(
    prepared: Path, tmp_path: Path, unwinds: bool
) -> None:
    shutil.copytree(prepared, tmp_path / "before")
    world = uncertain(World.open(tmp_path / "before"))
    upgrade = world.start("certain", order=Order.UNCERTAINTY)
    world.close()
    stage = Stage(tmp_path)
    for at in range(100):
        stage.set(tmp_path / "before")
        bomb = Bomb(at, unwinds=unwinds)
        with suppress(Killed):
            stage.mortal(bomb).step(upgrade, "mortal")
        survivor = stage.open()
        leases_run_out(survivor.store.catalog)
        begun = survivor.state(upgrade) is State.RUNNING
        assert positions(survivor, upgrade) == ([2, 3, 1] if begun else [1, 2, 3]), bomb.passed
        assert done(survivor, upgrade) == [2, 3, 1], bomb.passed
        if not bomb.went_off:
            assert at == 12  # four transactions, each with a moment before it, one before its commit and one after
            stage.close()
            return
    pytest.fail("validation never ends")


# --- most searched -----------------------------------------------------------------------------------------------------


def searched(world: World, hits: Hits, *axes: int, k: int = 1, model: str = "old") -> None:
    """Search for what lies on each of these axes, as an API process does."""
    for axis in axes:
        query = np.eye(OLD, dtype=np.float32)[axis]
        vectors = query if model == "old" else WITH_SIDE(query[None], np.zeros((1, 2)))[0]
        companions = {"old": query[None]} if model == "new" else None
        hits.count(world.search(model, vectors[None], k=k, companions=companions))


def on_axes(world: World) -> World:
    """One segment on each axis."""
    for axis in range(OLD):
        world.upsert("old", [f"i{axis}"], np.eye(OLD)[axis : axis + 1], side=np.zeros((1, 2)))
    return world


def test_the_segments_in_which_searches_found_most_are_transformed_first(each_world: World) -> None:
    hits, others = Hits(), Hits()
    searched(on_axes(each_world), hits, 3, 1, 3)
    searched(each_world, others, 1, 1, model="new")  # another process; what is counted is added up
    hits.write(each_world.store.catalog)
    others.write(each_world.store.catalog)
    upgrade = each_world.start(order=Order.MOST_SEARCHED)
    assert done(each_world, upgrade) == [2, 4, 1, 3]
    told = [(each["segment"], each["items"], each["hits"]) for each in report(each_world, upgrade)["first_segments"]]
    assert told == [(2, 1, 3), (4, 1, 2), (1, 1, 0), (3, 1, 0)]


def test_nobody_searched_so_the_order_is_that_of_storage(world: World) -> None:
    upgrade = on_axes(world).start(order=Order.MOST_SEARCHED)
    assert done(world, upgrade) == [1, 2, 3, 4]


def test_every_hit_of_every_query_counts_once_and_places_without_a_hit_do_not(world: World) -> None:
    on_axes(world)
    hits = Hits()
    hits.count(world.search("old", np.eye(OLD)[:3], k=50))
    world.delete("i0", "i1", "i2", "i3")
    hits.count(world.search("old", np.eye(OLD)[:3], k=50))
    hits.write(world.store.catalog)
    hits.write(world.store.catalog)
    assert counted(world) == {1: 3, 2: 3, 3: 3, 4: 3}


@pytest.mark.parametrize("at", [0, 1], ids=["before the transaction", "before its commit"])
def test_hits_that_could_not_be_written_are_written_the_next_time(prepared: Path, tmp_path: Path, at: int) -> None:
    stage = Stage(tmp_path)
    stage.set(prepared)
    hits, world = Hits(), stage.open()
    searched(on_axes(world), hits, 2)
    with pytest.raises(Killed):
        hits.write(stage.mortal(Bomb(at, unwinds=True)).store.catalog)
    assert counted(world) == {1: 0, 2: 0, 3: 0, 4: 0}
    searched(world, hits, 2)
    hits.write(world.store.catalog)
    assert counted(world) == {1: 0, 2: 0, 3: 2, 4: 0}
    stage.close()


def test_hits_of_a_gallery_that_was_deleted_are_passed_over(each_world: World) -> None:
    hits = Hits()
    searched(on_axes(each_world), hits, 0)
    removal.delete_gallery(each_world.store, GALLERY)
    each_world.make(GALLERY)
    on_axes(each_world)
    searched(each_world, hits, 1)
    hits.write(each_world.store.catalog)
    assert sorted(counted(each_world).values()) == [0, 0, 0, 1]


def test_counting_hits_is_not_seen_by_searches(world: World) -> None:
    hits = Hits()
    searched(on_axes(world), hits, 0)
    version = world.version()
    hits.write(world.store.catalog)
    assert world.version() == version


def counted(world: World) -> dict[int, int]:
    """What the catalog knows."""
    with world.store.catalog.reading() as session:
        return dict(session.execute(select(SegmentRow.id, SegmentRow.hits)).all())
