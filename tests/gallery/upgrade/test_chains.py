"""Upgrades on top of each other: old -> new -> newest, from where each column comes, and how they are taken back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery import errors
from gallery.catalog import models as model_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.lineage import Step
from gallery.upgrade import lifecycle, moves
from gallery.upgrade.states import State
from tests.gallery.chain import DIRECT, columns, digests, prepared, through
from tests.gallery.world import BACKWARD, GALLERY, Linear, World, distance, found

A, B = np.array([1.0, 2, 3, 4]), np.array([5.0, -1, 2, 0])
SIDE = np.array([2.0, 1])
QUERY = np.array([1.0, -2, 3, 0, 2, 5])
COMPANIONS = {"old": [[1, 2, 3, 4]], "new": [[1, 2, 3, 4, 5]]}
FIRST, DIRECTLY, COMPOSED = ("first",), ("direct",), ("first", "second")


@pytest.fixture(params=[True, False], ids=["direct", "composed"])
def direct(request: pytest.FixtureRequest) -> bool:
    """Whether old leads to newest directly; asked for by the tests to which it matters."""
    return bool(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Two items in old; and whether old leads to newest directly."""
    folder = tmp_path_factory.mktemp("chain")
    for direct in (True, False):
        world = prepared(folder / str(direct), direct=direct)
        world.upsert("old", ["a"], [A], side=[SIDE])
        world.upsert("old", ["b"], [B], side=[SIDE])
        world.close()
    return {direct: folder / str(direct) for direct in (True, False)}


@pytest.fixture
def world(request: pytest.FixtureRequest, folders: dict[bool, Path], tmp_path: Path) -> Iterator[World]:
    direct = request.getfixturevalue("direct") if "direct" in request.fixturenames else True
    shutil.copytree(folders[direct], tmp_path / "data")
    opened = World.open(tmp_path / "data")
    yield opened
    opened.close()


def upgraded(world: World, transformation: str = "first", **more: Any) -> str:
    """An upgrade that is completed."""
    upgrade = world.start(transformation, **more)
    assert world.run(upgrade) is State.COMPLETED, world.error(upgrade)
    return upgrade


def on_disk(world: World) -> int:
    """The bytes of all columns."""
    return sum(path.stat().st_size for path in world.store.files.root.glob("columns/*/*.npy"))


def takes(world: World, upgrade: str) -> list[str]:
    with world.store.catalog.reading() as session:
        row = upgrade_rows.upgrade_row(session, upgrade)
        return moves.takes(row, upgrade_rows.stack_of(session, row))


def would_free(world: World, upgrade: str) -> int | None:
    with world.store.catalog.reading() as session:
        row = upgrade_rows.upgrade_row(session, upgrade)
        return lifecycle.would_free(session, row, upgrade_rows.stack_of(session, row))


def scores(world: World, **more: Any) -> dict[str, float]:
    answer = world.search("newest", [QUERY], companions=COMPANIONS, **more)
    assert answer.score_space == "newest"
    return found(answer)


def expected(made: tuple[str, ...]) -> dict[str, float]:
    return {item: distance(QUERY, through(made, vector, SIDE)) for item, vector in (("a", A), ("b", B))}


def alike(*segments: int, **made: tuple[str, ...]) -> dict[int, dict[str, tuple[str, ...]]]:
    """Segments with columns that came about in the same way."""
    return {segment: dict(made) for segment in segments}


def test_on_top_of_an_upgrade_that_can_be_taken_back_a_direct_transformation_of_native_vectors_is_preferred(
    world: World, direct: bool
) -> None:
    upgraded(world)
    made = DIRECTLY if direct else COMPOSED
    assert scores(world) == expected(made)  # at query time, before the upgrade
    upgrade = world.start("second")
    while world.step(upgrade):
        assert scores(world) == expected(made)  # at every point of it
    assert world.state(upgrade) is State.COMPLETED, world.error(upgrade)
    assert columns(world) == alike(1, 2, old=(), new=FIRST, newest=made)
    with world.store.catalog.reading() as session:
        pinned = upgrade_rows.transformations(session, upgrade_rows.upgrade_row(session, upgrade))
    assert [each.name for each in pinned] == (["second", "direct"] if direct else ["second"])


def test_from_a_finalized_upgrade_derived_vectors_are_mapped_on_and_the_lineage_says_by_what(world: World) -> None:
    lifecycle.finalize(world.store, upgraded(world))
    upgraded(world, "second")
    assert columns(world) == alike(1, 2, new=FIRST, newest=COMPOSED)
    assert scores(world) == expected(COMPOSED)
    column = world.galleries.refresh().snapshot(GALLERY).segments[0].columns["newest"]
    registry = {each.name: each for each in world.galleries.current.registry.transformations}
    assert column.lineage == (
        Step("first", registry["first"].artifact, "old"),
        Step("second", registry["second"].artifact, "new"),
    )


def test_a_transformation_that_is_registered_later_changes_nothing_of_an_upgrade_that_runs(world: World) -> None:
    upgraded(world)
    upgrade = world.start("second")
    world.transformation("later", "old", "newest", LATER)
    while world.step(upgrade):
        assert scores(world) == expected(DIRECTLY)
    assert {made["newest"] for made in columns(world).values()} == {DIRECTLY}


def test_to_take_back_the_second_gives_the_first_byte_for_byte_and_only_then_the_first_can_be_taken_back(
    world: World,
) -> None:
    zero = digests(world)
    first = upgraded(world)
    one = digests(world)
    second = world.start("second")
    assert (takes(world, first), takes(world, second)) == ([], ["pause", "cancel"])
    for verb in (lifecycle.rollback, lifecycle.finalize):
        with pytest.raises(errors.InvalidStateTransition) as refused:
            verb(world.store, first)
        assert refused.value.details["allowed"] == []
    world.step(second)
    world.step(second)
    lifecycle.cancel(world.store, second)
    assert digests(world) == one
    second = upgraded(world, "second")
    assert (takes(world, first), takes(world, second)) == (["finalize"], ["rollback", "finalize"])
    with pytest.raises(errors.InvalidStateTransition) as refused:
        lifecycle.rollback(world.store, first)
    assert refused.value.details["allowed"] == ["finalize"]
    world.delete("b")
    lifecycle.rollback(world.store, second)
    assert digests(world) == one
    assert takes(world, first) == ["rollback", "finalize"]
    assert found(world.search("new", [QUERY[:5]])).keys() == {"a"}
    lifecycle.rollback(world.store, first)
    assert digests(world) == zero


def test_to_finalize_the_second_finalizes_what_it_lies_on(world: World) -> None:
    first = upgraded(world)
    second = upgraded(world, "second")
    old = on_disk(world)
    first_frees, frees = would_free(world, first), would_free(world, second)
    lifecycle.finalize(world.store, second)
    assert {frozenset(made) for made in columns(world).values()} == {frozenset({"newest"})}
    assert (world.state(first), world.state(second)) == (State.FINALIZED, State.FINALIZED)
    with world.store.catalog.reading() as session:
        reports = [upgrade_rows.upgrade_row(session, each).report for each in (first, second)]
    left = on_disk(world)
    assert reports[0]["finalized_with"] == second
    assert sum(report["bytes_freed"] for report in reports) == old - left == frees
    assert reports[0]["bytes_freed"] == first_frees
    assert 0 < (first_frees or 0) < (frees or 0)
    with pytest.raises(errors.ModelRetired):
        world.upsert("old", ["c"], [A], side=[SIDE])
    with pytest.raises(errors.ModelRetired):
        world.search("new", [QUERY[:5]])


def test_the_first_can_be_finalized_under_the_second_which_still_goes_back_to_it(world: World) -> None:
    first = upgraded(world)
    second = upgraded(world, "second")
    lifecycle.finalize(world.store, first)
    assert {frozenset(made) for made in columns(world).values()} == {frozenset({"new", "newest"})}
    lifecycle.rollback(world.store, second)
    assert columns(world) == alike(1, 2, new=FIRST)
    assert takes(world, first) == []


@pytest.mark.parametrize("cutover", ["progressive", "manual"])
def test_items_may_come_in_any_model_of_the_chain_while_the_second_runs_and_after_it(
    world: World, direct: bool, cutover: str
) -> None:
    made = DIRECTLY if direct else COMPOSED
    upgraded(world)
    upgrade = world.start("second", cutover=cutover)
    world.step(upgrade)
    world.upsert("old", ["c"], [A], side=[SIDE])
    world.upsert("new", ["d"], [[1, 2, 3, 4, 5]])
    world.upsert("newest", ["e"], [QUERY])
    assert [columns(world)[segment] for segment in (3, 4, 5)] == [
        {"old": (), "new": FIRST},
        {"new": ()},
        {"newest": ()},
    ]
    assert scores(world).keys() == {"a", "b", "c", "d", "e"}
    world.run(upgrade)
    if cutover == "manual":
        assert world.state(upgrade) is State.AWAITING_CUTOVER
        world.upsert("old", ["x"], [A], side=[SIDE])
        assert columns(world)[6] == {"old": (), "new": FIRST}  # the newest waits with all the others
        lifecycle.cutover(world.store, upgrade)
    else:
        world.upsert("old", ["x"], [A], side=[SIDE])
    assert columns(world) == {
        **alike(1, 2, 3, 6, old=(), new=FIRST, newest=made),
        4: {"new": (), "newest": ("second",)},
        5: {"newest": ()},
    }
    assert scores(world)["x"] == expected(made)["a"]
    with pytest.raises(errors.NativeItemsWouldBeUnreachable):
        lifecycle.rollback(world.store, upgrade)
    lifecycle.rollback(world.store, upgrade, accept_unreachable=True)
    assert columns(world) == {
        **alike(1, 2, 3, 6, old=(), new=FIRST),
        4: {"new": ()},
        5: {"newest": ()},
    }


def test_a_chain_does_not_go_back_to_where_it_was(world: World) -> None:
    upgraded(world)
    world.transformation("back", "new", "old", BACKWARD, "forward")
    with pytest.raises(errors.SameModel, match="still has its columns of old: roll back upgrade"):
        world.start("back")


def test_a_direct_transformation_can_be_asked_for_by_name_where_another_leads_on_from_the_gallerys_model(
    world: World,
) -> None:
    world.transformation("later", "old", "newest", LATER)
    upgraded(world)
    upgrade = upgraded(world, "direct")
    assert {made["newest"] for made in columns(world).values()} == {DIRECTLY}
    lifecycle.rollback(world.store, upgrade)
    upgraded(world, "second")
    assert {made["newest"] for made in columns(world).values()} == {("later",)}


def test_a_segment_is_made_from_the_column_that_its_side_information_suffices_for(world: World) -> None:
    world.transformation("hungry", "old", "newest", HUNGRY)
    world.upsert("old", ["bare"], [A])
    upgraded(world, on_missing_side_information="zeros")
    upgraded(world, "second")
    world.upsert("old", ["late"], [A])
    assert [columns(world)[segment]["newest"] for segment in (1, 3, 4)] == [("hungry",), COMPOSED, COMPOSED]


@pytest.mark.parametrize(("policy", "lacking"), [("fail", 0), ("zeros", 1)])
def test_a_dry_run_counts_those_whose_column_the_policy_makes_without_side_information(
    world: World, policy: Any, lacking: int
) -> None:
    world.transformation("hungry", "old", "newest", HUNGRY)
    world.upsert("old", ["bare", "deleted"], [A, B])
    world.delete("deleted")
    upgraded(world, on_missing_side_information="zeros")
    upgrade = upgraded(world, "second", on_missing_side_information=policy, dry_run=True)
    assert told(world, upgrade) == (lacking, "changes nothing", "maps 1 items with zeros in its place")
    upgraded(world, "second", on_missing_side_information=policy)
    assert columns(world)[3]["newest"] == (("hungry",) if policy == "zeros" else COMPOSED)


def test_nothing_is_missing_where_what_is_chosen_needs_no_side_information(world: World) -> None:
    world.register("wordy", 6, side_dimension=2)
    world.transformation("plain", "old", "wordy", DIRECT, "forward")
    world.transformation("hungry", "wordy", "newest", IN_PLACE, "forward")
    world.upsert("old", ["bare"], [A])
    upgraded(world, "plain")
    upgrade = upgraded(world, "hungry", on_missing_side_information="zeros", dry_run=True)
    assert told(world, upgrade) == (0, "changes nothing", "maps 0 items with zeros in its place")


def told(world: World, upgrade: str) -> tuple[int, str, str]:
    """What a report says of side-information: how many lack it, and what `fail` and `zeros` do."""
    with world.store.catalog.reading() as session:
        report = upgrade_rows.upgrade_row(session, upgrade).report
    by_policy = report["on_missing_side_information"]
    return report["items_without_side_information"], by_policy["fail"], by_policy["zeros"]


IN_PLACE = Linear(np.eye(6, dtype=int).tolist(), [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]])
LATER = Linear([[2, 0, 0, 0, 0, 0], *DIRECT.embedding[1:]])
HUNGRY = Linear(DIRECT.embedding, [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]])


def test_segments_whose_columns_came_about_differently_are_not_merged(world: World, direct: bool) -> None:
    upgraded(world)
    world.upsert("new", ["d"], [[1, 2, 3, 4, 5]])
    second = upgraded(world, "second")
    lifecycle.finalize(world.store, second)
    world.compact()
    assert sorted(made["newest"] for made in columns(world).values()) == sorted(
        [DIRECTLY if direct else COMPOSED, ("second",)]
    )
    assert scores(world).keys() == {"a", "b", "d"}


def test_a_native_vector_replaces_a_derived_one_at_any_time(world: World) -> None:
    def native(item: str) -> None:
        world.upsert("newest", [item], [QUERY])
        hits = {
            hit.id: (hit.origin, hit.score) for hit in world.search("newest", [QUERY], companions=COMPANIONS).hits(0)
        }
        assert hits[item] == ("native", 0)
        assert hits.keys() == {"a", "b"}

    upgraded(world)
    upgrade = world.start("second")
    world.step(upgrade)
    world.step(upgrade)
    native("a")  # while it runs
    assert world.run(upgrade) is State.COMPLETED
    native("b")  # once it is completed
    lifecycle.finalize(world.store, upgrade)
    native("b")  # and finalized
    assert {frozenset(made.items()) for made in columns(world).values()} >= {frozenset({("newest", ())})}


def test_what_the_first_left_out_cannot_be_forgotten_by_the_second(world: World, direct: bool) -> None:
    world.upsert("old", ["bare"], [A])
    upgraded(world, on_missing_side_information="skip")
    if direct:
        upgraded(world, "second")
        assert columns(world)[3] == {"old": (), "newest": DIRECTLY}
    else:
        told = "1 items, such as 'bare', have neither new nor newest vectors.* or delete them$"
        with pytest.raises(errors.WrongTransformation, match=told):
            world.start("second")
        world.delete("bare")
        assert world.run(world.start("second")) is State.COMPLETED


@pytest.mark.usefixtures("direct")
def test_the_second_is_told_to_wait_while_the_first_is_active(world: World) -> None:
    first = world.start("first")
    with pytest.raises(errors.UpgradeInProgress, match=first):
        world.start("second")
    assert world.run(first) is State.COMPLETED
    assert world.run(world.start("second")) is State.COMPLETED


@pytest.mark.parametrize("apart", [False, True], ids=["together", "one after the other"])
def test_what_the_first_left_out_is_let_go_of_once_the_second_that_took_it_along_is_finalized(
    world: World, apart: bool
) -> None:
    world.upsert("old", ["bare"], [A])
    first = upgraded(world, on_missing_side_information="skip")
    second = upgraded(world, "second")
    if apart:
        lifecycle.finalize(world.store, first)
        assert columns(world)[3] == {"old": (), "newest": DIRECTLY}  # the second can be taken back
    before = on_disk(world)
    frees = would_free(world, second)
    lifecycle.finalize(world.store, second)
    assert columns(world) == alike(1, 2, 3, newest=DIRECTLY)
    with world.store.catalog.reading() as session:
        freed = [
            upgrade_rows.upgrade_row(session, each).report["bytes_freed"]
            for each in ((second,) if apart else (first, second))
        ]
    assert sum(freed) == frees == before - on_disk(world)


def test_a_gallery_that_came_back_to_a_model_keeps_its_columns_of_that(world: World) -> None:
    lifecycle.finalize(world.store, upgraded(world))
    world.transformation("back", "new", "old", BACKWARD, "forward")
    lifecycle.finalize(world.store, upgraded(world, "back"))
    assert columns(world) == alike(1, 2, old=("first", "back"))
    lifecycle.finalize(world.store, upgraded(world, "direct"))
    assert columns(world) == alike(1, 2, newest=("first", "back", "direct"))


def test_an_item_that_the_first_leaves_out_is_refused_where_the_second_could_not_come_to_it(
    world: World, direct: bool
) -> None:
    upgraded(world, on_missing_side_information="skip")
    upgrade = world.start("second")
    world.step(upgrade)
    if not direct:
        with pytest.raises(errors.MissingSideInformation):
            world.upsert("old", ["bare"], [A])
        return
    world.upsert("old", ["bare"], [A])
    assert world.run(upgrade) is State.COMPLETED, world.error(upgrade)
    assert columns(world)[3] == {"old": (), "newest": DIRECTLY}


def test_where_only_unadvised_transformations_reach_all_segments_the_refusal_says_what_to_do(world: World) -> None:
    world.upsert("old", ["bare"], [A])
    upgraded(world, on_missing_side_information="skip")
    with world.store.catalog.transaction() as tx:
        model_rows.transformation_row(tx.session, "direct").evaluation = {"verdict": {"decision": "stay"}}
    with pytest.raises(
        errors.WrongTransformation, match="direct could, but its fit said that it gains nothing by itself: register"
    ):
        world.start("second")
