"""What a worker does for a fit: leases, upgrades first, stops, other workers, pairs that are gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text, update
from sqlalchemy.exc import IntegrityError

from gallery import errors, faults, fits, fitting, orphans
from gallery.catalog import fits as fit_rows
from gallery.catalog import models as model_rows
from gallery.catalog.tables import FitRow, now
from gallery.catalog.transaction import Transaction
from gallery.fits import Asked, NewFit, Outcome, Tell
from gallery.pairs import NewPairs, Pairs
from gallery.removal import delete_gallery
from gallery.spaces import Direction
from gallery.transforms import artifact_file
from gallery.upgrade import lifecycle
from gallery.upgrade.states import State
from tests.gallery.crash import Bomb, Killed, Stage
from tests.gallery.solver import Solver
from tests.gallery.world import BACKWARD, GALLERY, PLAIN, World, lost_connection
from workers.fitting import fit_pairs
from workers.settings import WorkerSettings
from workers.tasks import Worker

IDS = [f"i{row}" for row in range(20)]
OLD_VECTORS = np.random.default_rng(0).integers(-5, 5, (20, 4)).astype(np.float32) + 0.5
NEW_VECTORS = PLAIN(OLD_VECTORS)
SIDE = np.arange(40, dtype=np.float32).reshape(20, 2)


@contextmanager
def filled(folder: Path, url: str = "") -> Iterator[World]:
    opened = World.open(folder, url).prepare(("forward", "old", "new", PLAIN))
    opened.upsert("old", IDS[:15], OLD_VECTORS[:15], side=SIDE[:15])
    opened.upsert("old", IDS[15:], OLD_VECTORS[15:], side=SIDE[15:])
    yield opened
    opened.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with filled(tmp_path / "data") as opened:
        yield opened


def start(world: World, name: str = "fitted", **more: object) -> str:
    new = NewFit(GALLERY, name, "new", NewPairs(IDS, NEW_VECTORS), request_sha256="0" * 64)
    return fits.start(world.store, replace(new, **more)).fit_id  # type: ignore[arg-type]


def worker(world: World, fit: fits.Fit) -> Worker:
    return Worker(world.store, WorkerSettings(), fit)


def row(world: World, fit_id: str) -> FitRow:
    with world.store.catalog.reading() as session:
        return fit_rows.fit_row(session, fit_id)


def change(world: World, fit_id: str, **values: object) -> None:
    tx: Transaction
    with world.store.catalog.transaction() as tx:
        tx.session.execute(update(FitRow).where(FitRow.id == fit_id).values(**values))


def transformations(world: World) -> list[str]:
    with world.store.catalog.reading() as session:
        return [each.name for each in model_rows.registry(session).transformations]


def test_it_is_given_the_stored_vectors_of_the_ids_in_their_order(world: World) -> None:
    order = np.random.default_rng(1).permutation(20)
    ids = [IDS[at] for at in order]
    start(world, pairs=NewPairs(ids, NEW_VECTORS[order], labels=[str(at) for at in order]), seed=7)
    solver = Solver()
    worker(world, solver).work()
    ((given, asked),) = solver.given
    assert np.array_equal(given.source, OLD_VECTORS[order])
    assert np.array_equal(given.target, NEW_VECTORS[order])
    assert given.side is not None
    assert np.array_equal(given.side, SIDE[order])
    assert given.labels is not None
    assert given.labels.tolist() == [str(at) for at in order]
    assert asked == Asked("auto", "forward", metric="euclidean", other_metric="euclidean", seed=7)
    assert transformations(world) == ["forward", "fitted"]


@pytest.mark.parametrize(
    ("direction", "metrics"), [("forward", ("cosine", "euclidean")), ("backward", ("euclidean", "cosine"))]
)
def test_it_is_told_how_either_model_is_searched(world: World, direction: Direction, metrics: tuple[str, str]) -> None:
    world.register("unit", NEW_VECTORS.shape[1], "inner_product", normalized=True)
    start(world, target="unit", direction=direction)
    solver = Solver()
    worker(world, solver).work()
    ((_, asked),) = solver.given
    assert (asked.metric, asked.other_metric) == metrics


def test_side_information_is_left_out_where_it_is_not_wanted_or_not_whole(world: World) -> None:
    solver = Solver()
    start(world, "without", use_side=False)
    worker(world, solver).work()
    assert solver.given[-1][0].side is None
    world.upsert("old", IDS[:2], OLD_VECTORS[:2])
    fit = start(world, "partly")
    worker(world, solver).work()
    assert solver.given[-1][0].side is None
    assert row(world, fit).report["warnings"] == ["side-information is not fitted: 2 pairs have none"]


def test_items_that_are_gone_since_are_left_out_and_it_says_so(world: World) -> None:
    fit = start(world)
    world.delete("i3", "i17")
    solver = Solver()
    worker(world, solver).work()
    kept = [at for at in range(20) if at not in (3, 17)]
    assert solver.given[0][0].gallery == len(kept)
    assert np.array_equal(solver.given[0][0].source, OLD_VECTORS[kept])
    assert np.array_equal(solver.given[0][0].target, NEW_VECTORS[kept])
    assert row(world, fit).report["warnings"] == ["2 of 20 pairs are left out: their items were deleted meanwhile"]


def test_items_that_came_natively_in_the_new_model_since_are_left_out_and_not_called_deleted(world: World) -> None:
    fit = start(world)
    upgrade = world.start()
    world.step(upgrade)
    world.upsert("new", IDS[:5], NEW_VECTORS[:5])
    world.delete("i17")
    solver = Solver()
    worker(world, solver).work()
    kept = [at for at in range(5, 20) if at != 17]
    assert np.array_equal(solver.given[0][0].source, OLD_VECTORS[kept])
    assert row(world, fit).report["warnings"] == [
        "1 of 20 pairs are left out: their items were deleted meanwhile",
        "5 of 20 pairs are left out: their items have no vector of old any more",
    ]


def test_a_fit_whose_source_vectors_were_let_go_of_says_so(world: World) -> None:
    fit = start(world)
    upgrade = world.start()
    assert world.run(upgrade) is State.COMPLETED
    lifecycle.finalize(world.store, upgrade)
    solver = Solver()
    worker(world, solver).work()
    found = row(world, fit)
    assert (found.state, found.attempts, solver.given) == ("failed", 1, [])
    assert found.error == "unusable_pairs: 20 of 20 pairs are left out: their items have no vector of old any more"


def test_the_pairs_of_a_fit_that_waits_are_no_orphans(world: World) -> None:
    start(world, pairs=NewPairs(IDS, NEW_VECTORS, labels=IDS))
    assert orphans.found(world.store.catalog, world.store.files, "fits", older_than=-60) == []
    assert len(list((world.store.files.root / "fits").iterdir())) == 3


def test_an_upgrade_that_begins_meanwhile_is_done_first(world: World) -> None:
    fit = start(world)
    states: list[State] = []
    upgrades: list[str] = []
    solver = Solver(between=lambda: upgrades.append(world.start()))

    def looking(pairs: Pairs, asked: Asked, path: Path, tell: Tell) -> Outcome:
        outcome = solver(pairs, asked, path, tell)
        states.append(world.state(upgrades[0]))
        return outcome

    worker(world, looking).work()
    assert states == [State.COMPLETED]
    assert row(world, fit).state == "completed"


def test_a_worker_that_is_told_to_stop_gives_the_fit_back(world: World) -> None:
    fit = start(world)
    solver = Solver()
    stopping = worker(world, solver)
    solver.between = stopping.stop
    stopping.work()
    found = row(world, fit)
    assert (found.state, found.attempts, found.fraction, found.owner) == ("pending", 0, 0.0, None)
    another = worker(world, Solver())
    assert another.has_work()
    another.work()
    assert row(world, fit).state == "completed"
    assert not another.has_work()


@pytest.mark.parametrize("asked", ["FROM upgrades", "fits"])
def test_a_connection_that_is_lost_between_two_steps_costs_no_training(
    tmp_path: Path, postgres_url: str, asked: str
) -> None:
    with filled(tmp_path / "data", postgres_url) as world, ExitStack() as lost:
        solver = Solver(between=lambda: lost.enter_context(lost_connection(world.store.catalog, before=asked)))
        fit = start(world)
        worker(world, solver).work()
        found = row(world, fit)
    assert (found.state, found.attempts, found.error) == ("completed", 1, None)
    assert len(solver.given) == 1


def test_a_fit_that_is_cancelled_meanwhile_registers_nothing(world: World) -> None:
    fit = start(world)
    worker(world, Solver(between=lambda: fits.cancel(world.store, fit) and None)).work()
    assert row(world, fit).state == "cancelled"
    assert transformations(world) == ["forward"]
    assert list((world.store.files.root / "fits").iterdir()) == []
    assert not list((world.store.files.root / "artifacts").glob("*.part"))


def test_the_fit_of_a_worker_that_went_silent_is_taken_over_and_registered_once(world: World) -> None:
    fit = start(world)
    taken = Solver()

    def frozen() -> None:
        change(world, fit, leased_until=now() - timedelta(seconds=1))
        worker(world, taken).work()

    worker(world, Solver(between=frozen)).work()
    found = row(world, fit)
    assert (found.state, found.attempts, found.fence) == ("completed", 2, 2)
    assert len(taken.given) == 1
    assert transformations(world) == ["forward", "fitted"]


@pytest.mark.parametrize("unwinds", [False, True], ids=["killed", "interrupted"])
def test_a_worker_may_die_at_any_moment_of_a_fit_and_another_ends_it(tmp_path: Path, unwinds: bool) -> None:
    with filled(tmp_path / "before") as before:
        fit = start(before)
    stage = Stage(tmp_path)
    for at in range(100):
        stage.set(tmp_path / "before")
        bomb = Bomb(at, unwinds=unwinds)
        with suppress(Killed):
            fitting.advance(stage.mortal(bomb).store, fit, "mortal", Solver(), lambda: True)
        survivor = stage.open()
        if row(survivor, fit).state == "running":
            change(survivor, fit, leased_until=now() - timedelta(seconds=1))
        worker(survivor, Solver()).work()
        assert row(survivor, fit).state == "completed", bomb.passed
        assert transformations(survivor) == ["forward", "fitted"]
        assert left_over(survivor, "fits") == set()
        assert left_over(survivor, "artifacts") == {Path(artifact_file(str(row(survivor, fit).artifact))).name}
        if not bomb.went_off:
            assert at > 8, "no moment to die at was found"
            stage.close()
            return
    pytest.fail("the fit never ends")


def left_over(world: World, folder: str) -> set[str]:
    """Files that stay after a sweep, without those that were there from the start."""
    orphans.remove(world.store.catalog, world.store.files, folder, older_than=-60)
    with world.store.catalog.reading() as session:
        given = {f"{each.artifact}.safetensors" for each in model_rows.registry(session).transformations[:1]}
    return {path.name for path in (world.store.files.root / folder).iterdir()} - given


def test_both_databases_take_a_fit_over_register_it_once_and_let_nobody_else_want_its_name(
    tmp_path: Path, catalog_url: str
) -> None:
    with filled(tmp_path / "data", catalog_url) as world:
        fit = start(world)
        with pytest.raises(errors.TransformationExists):
            start(world)
        change(world, fit, state="running", fence=1, attempts=1, leased_until=now() - timedelta(seconds=1))
        worker(world, Solver()).work()
        assert (row(world, fit).state, row(world, fit).fence) == ("completed", 2)
        assert transformations(world) == ["forward", "fitted"]
        insert(world, "a")
        with pytest.raises(IntegrityError):
            insert(world, "b")


def insert(world: World, fit_id: str) -> None:
    with world.store.catalog.transaction() as tx:
        tx.session.execute(text(A_FIT), {"id": fit_id})


A_FIT = """INSERT INTO fits (id, gallery_id, gallery_name, source_id, target_id, name, method, direction, seed, pairs, state,
    active, fence, attempts, fraction, report, request_sha256, created_at)
    VALUES (:id, 1, 'photos', 1, 2, 'wanted', 'auto', 'forward', 0, 1, 'pending',
    true, 0, 0, 0, '{}', '', '2026-01-01')"""


def test_a_fit_whose_workers_die_is_ended_after_so_many(world: World) -> None:
    fit = start(world)
    change(world, fit, state="running", leased_until=now() - timedelta(seconds=1), attempts=3)
    solver = Solver()
    worker(world, solver).work()
    assert (row(world, fit).state, row(world, fit).error) == ("failed", "its worker died 3 times")
    assert solver.given == []


def test_the_fit_of_the_dead_is_taken_over_although_the_clock_was_set_back(world: World) -> None:
    fit = start(world)
    change(world, fit, state="running", fence=1, attempts=1, leased_until=now() + timedelta(seconds=30))
    assert fitting.due(world.store) == []
    faults.arm("clock:-3600")
    try:
        assert fitting.due(world.store) == [fit]
        worker(world, Solver()).work()
    finally:
        faults.arm(None)
    assert (row(world, fit).state, row(world, fit).fence) == ("completed", 2)


def refusing(error: Exception) -> fits.Fit:
    def fit(pairs: Pairs, asked: Asked, path: Path, tell: Tell) -> Outcome:
        raise error

    return fit


def test_pairs_that_cannot_be_fitted_are_not_tried_again_and_other_failures_are(world: World) -> None:
    hopeless = start(world, "hopeless")
    worker(world, refusing(errors.UnusablePairs("all rows are the same"))).work()
    found = row(world, hopeless)
    assert (found.state, found.attempts, found.error) == ("failed", 1, "unusable_pairs: all rows are the same")
    unlucky = start(world, "unlucky")
    worker(world, refusing(OSError("no space left"))).work()
    found = row(world, unlucky)
    assert (found.state, found.attempts, found.error) == ("failed", 3, "OSError: no space left")
    assert list((world.store.files.root / "fits").iterdir()) == []


def test_pairs_of_which_too_few_are_left_say_why(world: World) -> None:
    fit = start(world)
    world.delete(*IDS[:11])
    worker(world, fit_pairs).work()
    found = row(world, fit)
    assert (found.state, found.attempts) == ("failed", 1)
    assert "source has 9 rows" in str(found.error)
    assert "11 of 20 pairs are left out: their items were deleted meanwhile" in str(found.error)


@pytest.mark.parametrize(
    ("gallery", "labelled", "said"), [(10_100, False, True), (9_900, False, False), (10_100, True, False)]
)
def test_a_verdict_without_labels_is_for_the_whole_gallery_and_says_where_pairs_are_too_few_for_it(
    tmp_path: Path, gallery: int, labelled: bool, said: bool
) -> None:
    rng = np.random.default_rng(0)
    old, new = (rng.standard_normal((200, 4)).astype(np.float32) for _ in range(2))
    labels = np.repeat([str(at) for at in range(4)], 50) if labelled else None
    given = Pairs(source=old, target=new, side=None, labels=labels, gallery=gallery)
    asked = Asked("affine", "forward", metric="cosine", other_metric="cosine", seed=0)
    verdict = fit_pairs(given, asked, tmp_path / "map", lambda *_: None).report["verdict"]
    assert ("100 items without labels cannot tell what is found in a gallery of 10,100" in verdict["reason"]) is said
    assert (f"in a gallery of {gallery:,}, as far as 100 items show it" in verdict["reason"]) is not (labelled or said)


def test_a_name_that_is_taken_meanwhile_loses_nothing(world: World) -> None:
    fit = start(world)
    solver = Solver(between=lambda: world.transformation("fitted", "new", "old", BACKWARD))
    worker(world, solver).work()
    found = row(world, fit)
    assert found.state == "failed"
    assert found.error is not None
    assert str(found.artifact) in found.error
    with world.store.catalog.reading() as session:
        assert model_rows.artifact_row(session, str(found.artifact)).architecture["source_dimension"] == 4


def test_the_fit_of_a_gallery_that_was_deleted_fails_and_says_so(world: World) -> None:
    fit = start(world)
    delete_gallery(world.store, GALLERY)
    worker(world, Solver()).work()
    assert (row(world, fit).state, row(world, fit).error) == (
        "failed",
        "gallery_not_found: the gallery 'photos' was deleted",
    )


def test_pairs_that_were_damaged_on_disk_are_not_fitted(world: World) -> None:
    fit = start(world)
    path = world.store.files.path(str(row(world, fit).vectors_file))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fitting.due(world.store) == [fit]
    worker(world, Solver()).work()
    assert row(world, fit).state == "failed"
    assert "does not have its recorded SHA-256" in str(row(world, fit).error)
