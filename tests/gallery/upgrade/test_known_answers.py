"""A transformation that is not the right one is caught before the first write, wherever an answer is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gallery.arrays import Metric, Vectors
from gallery.catalog import probes as probe_rows
from gallery.catalog.galleries import gallery_row
from gallery.catalog.upgrades import upgrade_row
from gallery.upgrade import lifecycle
from gallery.upgrade.known_answers import FEWEST, Tried, compared
from gallery.upgrade.states import State
from tests.gallery.world import GALLERY, OLD, WITH_SIDE, Linear, World

ROWS, WIDE = 80, 64
Map = Callable[[Vectors], Vectors]


def vectors(seed: int, dimension: int, rows: int = ROWS) -> Vectors:
    """Anything."""
    return np.random.default_rng(seed).integers(-20, 21, (rows, dimension)).astype(np.float32)


def turned(seed: int, dimension: int = WIDE) -> Vectors:
    """A rotation, far from doing nothing."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dimension, dimension)))[0].astype(np.float32)


def near(seed: int = 3) -> Vectors:
    """A rotation that does little."""
    skew = np.triu(np.random.default_rng(seed).normal(size=(WIDE, WIDE)), 1) * 0.05
    q, r = np.linalg.qr(np.eye(WIDE) + skew - skew.T)
    return (q * np.sign(np.diag(r))).astype(np.float32)


def judged(mapping: Map, true: Vectors, source: Vectors) -> dict[str, Any]:
    """What is found of a map where the answers are those of a rotation."""
    target = source @ true
    return compared(Tried(mapping(source), None, mapping(target)), source, target, metric="cosine")


def found(world: World, upgrade: str) -> dict[str, Any]:
    """The first known answers of a report."""
    with world.store.catalog.reading() as session:
        report = upgrade_row(session, upgrade).report
    (first, *_) = report["known_answers"]
    assert first["wrong"] is None or any(
        check["check"] == "known_answers" and not check["passed"] for check in report["checks"]
    )
    return dict(first)


# --- the comparison -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mapping", "wrong"),
    [
        (lambda x: x @ turned(1), None),
        (lambda x: x @ turned(1) + vectors(9, WIDE), None),  # far from exact, and yet the right one
        (lambda x: x @ turned(1).T, "those of others"),  # the wrong way round
        (lambda x: x @ turned(2), "those of others"),  # of other models
        (np.ones_like, "those of others"),  # everything becomes one
    ],
)
def test_the_right_map_is_told_from_others(mapping: Map, wrong: str | None) -> None:
    told = judged(mapping, turned(1), vectors(0, WIDE))
    assert (told["wrong"] is None) == (wrong is None), told
    assert wrong is None or wrong in told["wrong"]
    assert told["pairs"] == ROWS
    assert told["mean_cosine_unmapped"] is not None


def test_between_spaces_that_are_near_the_wrong_way_round_is_caught_by_trying_the_other() -> None:
    """A new model that is a fine-tuned old one: whatever way vectors are turned, they stay nearer than by chance."""
    source = vectors(0, WIDE)
    assert judged(lambda x: x @ near(), near(), source)["wrong"] is None
    told = judged(lambda x: x @ near().T, near(), source)
    assert told["mean_cosine"] > told["mean_cosine_of_others"] + 0.1
    assert "it maps the answers to the vectors (1.000) better" in told["wrong"]
    assert judged(lambda x: x, near(), source)["wrong"] is None  # nothing is done, and nothing is claimed


def test_a_map_that_is_worse_than_none_is_caught() -> None:
    told = judged(lambda x: x @ near(8) @ near(9), near(), vectors(0, WIDE))
    assert "nearer to their answers without it" in told["wrong"]


def test_side_information_that_is_not_of_these_items_is_caught() -> None:
    source, side, others = vectors(0, WIDE), vectors(1, WIDE), vectors(2, WIDE)
    target = source + side

    def by(given: Vectors) -> Tried:
        return Tried(source + given, source + np.roll(given, 1, axis=0))

    assert compared(by(side), source, target, metric="cosine")["wrong"] is None
    for strange in (others, others / 9):
        told = compared(by(strange), source, target, metric="cosine")
        assert "the side-information of other items serves as well" in told["wrong"]
    assert (
        compared(Tried(source, source), source, target, metric="cosine")["wrong"] is None
    )  # the map makes nothing of it


@pytest.mark.parametrize("metric", ["inner_product", "euclidean"])
def test_a_map_that_was_fitted_for_cosine_or_in_another_unit_is_caught_where_lengths_count(metric: Metric) -> None:
    """Beside items that the new model embeds itself, what it gives would be found never, or always."""
    source = vectors(0, WIDE)
    target = source @ turned(1)
    for factor in (0.01, 100.0):
        told = compared(Tried(factor * target), source, target, metric=metric)
        assert "its vectors have a length of" in told["wrong"]
        assert compared(Tried(factor * target), source, target, metric="cosine")["wrong"] is None
    far = vectors(9, WIDE)  # half of an answer is of what the old model does not see: least squares halve the length
    assert compared(Tried(target / 2), source, (target + far) / 2**0.5, metric=metric)["wrong"] is None


def test_few_pairs_are_told_and_not_judged() -> None:
    source = vectors(0, WIDE, FEWEST - 1)
    told = compared(Tried(-source), source, source, metric="cosine")
    assert (told["wrong"], told["pairs"]) == (None, FEWEST - 1)
    assert told["mean_cosine"] == pytest.approx(-1)
    source = vectors(0, WIDE, FEWEST)
    assert compared(Tried(-source), source, source, metric="cosine")["wrong"]


# --- where answers are known --------------------------------------------------------------------------------------------


def square(weight: Vectors) -> Linear:
    """An exact map of four dimensions, in whole numbers."""
    return Linear(weight.astype(int).tolist())


TURN = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [-1, 0, 0, 0]], np.float32)


#: sends everything to where `WITH_SIDE` sends something else
STRANGE = Linear(
    [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]], [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
)


@pytest.fixture
def equal(world: World) -> World:
    """A second model of the old one's dimension, the transformation to it, and the same the wrong way round."""
    world.register("second", OLD)
    world.transformation("right", "old", "second", square(TURN))
    world.transformation("reversed", "old", "second", square(TURN.T))
    world.upsert("old", [f"i{row}" for row in range(ROWS)], vectors(0, OLD))
    return world


def test_probes_catch_a_transformation_that_is_applied_the_wrong_way_round(equal: World) -> None:
    queries = vectors(5, OLD)
    with equal.store.catalog.transaction() as tx:
        probes = [({"old": query, "second": query @ TURN}, None) for query in queries]
        probe_rows.replace(tx.session, gallery_row(tx.session, GALLERY).id, probes)
    wrong = equal.start("reversed", dry_run=True)
    assert equal.run(wrong) is State.FAILED
    assert "reversed does not map old to second" in (equal.error(wrong) or "")
    assert "80 pairs: the gallery's probes" in (equal.error(wrong) or "")
    right = equal.start("right", dry_run=True)
    assert equal.run(right) is State.COMPLETED, equal.error(right)
    assert found(equal, right)["mean_cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("metric", "then"), [("inner_product", State.COMPLETED), ("euclidean", State.FAILED)])
def test_queries_may_have_any_length_by_the_inner_product_and_refuse_no_transformation_by_it(
    equal: World, metric: Metric, then: State
) -> None:
    """Who searches by it may send unit queries, or those of another tower than the items'."""
    for name in ("short", "long"):
        equal.register(name, OLD, metric)
    equal.transformation("longer", "short", "long", square(10 * TURN), "forward")
    equal.make("products", model="short")
    items, queries = vectors(0, OLD), vectors(5, OLD)
    equal.upsert("short", [f"i{row}" for row in range(ROWS)], items, gallery="products")
    with equal.store.catalog.transaction() as tx:
        probes = [({"short": query, "long": query @ TURN}, None) for query in queries]
        probe_rows.replace(tx.session, gallery_row(tx.session, "products").id, probes)
    upgrade = equal.start("longer", gallery="products", dry_run=True)
    assert equal.run(upgrade) is then, equal.error(upgrade)


def test_answers_that_it_maps_to_no_finite_vectors_are_a_reason_not_to_start(each_world: World) -> None:
    world = each_world
    world.register("second", OLD)
    world.transformation("huge", "old", "second", Linear((np.eye(OLD, dtype=int) * 10**18).tolist()))
    world.upsert("old", ["a"], vectors(0, OLD, 1))
    far = {"old": np.full(OLD, 1e30, np.float32), "second": np.ones(OLD, np.float32)}
    with world.store.catalog.transaction() as tx:
        probe_rows.replace(tx.session, gallery_row(tx.session, GALLERY).id, [(far, None)] * 2)
    upgrade = world.start("huge")
    with np.errstate(over="ignore", invalid="ignore"):
        assert world.run(upgrade) is State.FAILED
    assert "huge gives no finite vectors from the gallery's probes" in (world.error(upgrade) or "")


def test_without_known_answers_nothing_is_refused_and_the_report_says_so(equal: World) -> None:
    upgrade = equal.start("reversed", dry_run=True)
    assert equal.run(upgrade) is State.COMPLETED
    with equal.store.catalog.reading() as session:
        checks = {each["check"]: each for each in upgrade_row(session, upgrade).report["checks"]}
    assert checks["known_answers"]["passed"]
    assert "not checked: fewer than 16 answers are known" in checks["known_answers"]["detail"]


def test_items_that_were_embedded_again_catch_it_too_with_their_side_information(each_world: World) -> None:
    world = each_world
    ids, old, side = [f"i{row}" for row in range(ROWS)], vectors(0, OLD), vectors(1, 2)
    world.upsert("old", ids, old, side=side)
    first = world.start()
    world.upsert("new", ids[:64], WITH_SIDE(old[:64], side[:64]))
    lifecycle.cancel(world.store, first, accept_unreachable=True)
    world.transformation("strange", "old", "new", STRANGE)
    wrong = world.start("strange", dry_run=True)
    assert world.run(wrong) is State.FAILED
    assert "64 pairs: items that new embedded again" in (world.error(wrong) or "")
    right = world.start(dry_run=True)
    assert world.run(right) is State.COMPLETED, world.error(right)
    assert found(world, right)["mean_cosine"] == pytest.approx(1, abs=1e-6)
    assert found(world, right)["mean_cosine_with_others_side"] < 0.99


def test_of_items_that_changed_before_they_were_embedded_again_only_what_they_were_last_is_known(equal: World) -> None:
    ids = [f"changing{row}" for row in range(FEWEST)]
    for seed in range(10, 16):
        last = vectors(seed, OLD, FEWEST)
        equal.upsert("old", ids, last)
    first = equal.start("right")
    equal.upsert("second", ids, last @ TURN)
    lifecycle.cancel(equal.store, first, accept_unreachable=True)
    upgrade = equal.start("right", dry_run=True)
    assert equal.run(upgrade) is State.COMPLETED, equal.error(upgrade)
    assert (found(equal, upgrade)["pairs"], found(equal, upgrade)["mean_cosine"]) == (
        FEWEST,
        pytest.approx(1, abs=1e-6),
    )


def test_items_that_came_again_because_they_had_changed_refuse_the_right_one_until_a_person_says_so(
    equal: World,
) -> None:
    changed = [f"i{row}" for row in range(FEWEST)]
    first = equal.start("right")
    equal.upsert("second", changed, vectors(7, OLD, FEWEST))
    lifecycle.cancel(equal.store, first, accept_unreachable=True)
    refused = equal.start("right")
    assert equal.run(refused) is State.FAILED
    assert "16 pairs: items that second embedded again" in (equal.error(refused) or "")
    assert "`on_contradicting_items`: `ignore`" in (equal.error(refused) or "")
    lifecycle.cancel(equal.store, refused, accept_unreachable=True)
    upgrade = equal.start("right", on_contradicting_items="ignore")
    assert equal.run(upgrade) is State.COMPLETED, equal.error(upgrade)


def test_what_else_is_known_still_refuses_a_wrong_one_where_items_are_ignored(equal: World) -> None:
    queries = vectors(5, OLD)
    with equal.store.catalog.transaction() as tx:
        probes = [({"old": query, "second": query @ TURN}, None) for query in queries]
        probe_rows.replace(tx.session, gallery_row(tx.session, GALLERY).id, probes)
    wrong = equal.start("reversed", on_contradicting_items="ignore")
    assert equal.run(wrong) is State.FAILED
    assert "80 pairs: the gallery's probes" in (equal.error(wrong) or "")
    assert "on_contradicting_items" not in (equal.error(wrong) or "")


def test_a_transformation_that_nobody_named_is_tried_too_where_it_will_be_used(equal: World) -> None:
    equal.register("third", OLD)
    equal.transformation("onward", "second", "third", square(TURN), "forward")
    equal.transformation("shortcut", "old", "third", square(TURN.T @ TURN.T))  # the wrong way round
    queries = vectors(5, OLD)
    with equal.store.catalog.transaction() as tx:
        embedded = {"old": queries, "second": queries @ TURN, "third": queries @ TURN @ TURN}
        probes = [({name: of[row] for name, of in embedded.items()}, None) for row in range(len(queries))]
        probe_rows.replace(tx.session, gallery_row(tx.session, GALLERY).id, probes)
    first = equal.start("right")
    assert equal.run(first) is State.COMPLETED, equal.error(first)
    second = equal.start("onward")
    assert equal.run(second) is State.FAILED
    assert "shortcut does not map old to third" in (equal.error(second) or "")
    assert "onward does not map" not in (equal.error(second) or "")
    lifecycle.cancel(equal.store, second)
    equal.transformation("mended", "old", "third", square(TURN @ TURN))
    third = equal.start("onward")
    assert equal.run(third) is State.COMPLETED, equal.error(third)
