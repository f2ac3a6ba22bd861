"""Invariants of ARCHITECTURE.md, each with a test that can fail. The docstrings cite them, by a number of ours.

`test_upgrade_machine.py` and `test_crashes.py` look for what breaks them in any order; here each stands by itself, with threads
and on both databases where that matters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event, func, select, update
from sqlalchemy.exc import IntegrityError

from gallery import errors, removal
from gallery import verify as checks
from gallery.catalog.tables import ColumnRow, ItemRow, SegmentRow, UpgradeRow, UpgradeSegmentRow
from gallery.catalog.upgrades import Lease, upgrade_row
from gallery.columns import verify
from gallery.files import digest
from gallery.transforms import artifact_file
from gallery.upgrade import drive, lifecycle, segment
from gallery.upgrade.states import State
from tests.gallery.crash import stored_files
from tests.gallery.world import PLAIN, WITH_SIDE, World, distance, found, work
from workers.settings import WorkerSettings
from workers.tasks import Worker

OLD = np.array([[3, -1, 4, 1]], np.float32)
NEW = np.array([[2, 7, -1, 8, 2]], np.float32)
BOTH = {"companions": {"old": OLD}}


def numbers(seed: int, rows: int, dimension: int) -> Any:
    """Small whole numbers as float32."""
    return np.random.default_rng(seed).integers(-9, 10, (rows, dimension)).astype(np.float32)


def fill(world: World, requests: int = 3, each: int = 4) -> dict[str, tuple[Any, Any]]:
    """Requests of items in old with side-information; returns what was written."""
    written = {}
    for at in range(requests):
        ids = [f"i{at}-{n}" for n in range(each)]
        vectors, side = numbers(at, each, 4), numbers(100 + at, each, 2)
        world.upsert("old", ids, vectors, side=side, payloads=[{"id": item} for item in ids])
        written.update(zip(ids, zip(vectors, side, strict=True), strict=True))
    return written


def in_new(written: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """What a query in new must find."""
    return {i: distance(NEW[0], WITH_SIDE(v[None], s[None])[0]) for i, (v, s) in written.items()}


def in_old(written: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """What a query in old must find."""
    return {item: distance(OLD[0], vector) for item, (vector, _) in written.items()}


def test_1_every_live_item_is_found_exactly_once_at_every_step_of_an_upgrade(each_world: World) -> None:
    """1. Every live item is in the candidate universe of every search exactly once, at any progress."""
    written = fill(each_world)
    upgrade = each_world.start()
    fractions = []
    while True:
        answer = each_world.search("new", NEW, **BOTH)
        assert found(answer) == in_new(written)
        assert found(each_world.search("old", OLD)) == in_old(written)
        fractions.append(answer.coverage.direct / 12)
        if not each_world.step(upgrade):
            break
    assert sorted(set(fractions)) == [0, 1 / 3, 2 / 3, 1]


def test_1_concurrent_upserts_of_one_id_leave_one_live_row(each_world: World) -> None:
    """1. Never twice: whichever of concurrent upserts is last wins alone."""
    barrier = threading.Barrier(4)

    def write(seed: int) -> None:
        barrier.wait()
        for turn in range(4):
            each_world.upsert("old", ["same", f"own-{seed}"], numbers(seed * 10 + turn, 2, 4), side=numbers(seed, 2, 2))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    with each_world.store.catalog.reading() as session:
        live = select(func.count()).where(ItemRow.item_id == "same", ItemRow.deleted_version.is_(None))
        assert session.scalar(live) == 1
    assert found(each_world.search("old", OLD)).keys() == {"same", "own-0", "own-1", "own-2", "own-3"}
    assert each_world.version() == 16


def test_2_a_search_sees_one_version_while_another_thread_publishes(each_world: World) -> None:
    """2. One search sees one snapshot: each answer is right as of the version that it names."""
    truth: dict[int, dict[str, float]] = {0: {}}
    done = threading.Event()

    def publish() -> None:
        items: dict[str, tuple[Any, Any]] = {}
        try:
            for turn in range(30):
                ids = [f"i{turn % 5}", f"j{turn % 3}"]
                vectors, side = numbers(turn, 2, 4), numbers(turn, 2, 2)
                items.update(zip(ids, zip(vectors, side, strict=True), strict=True))
                # Known before it can be seen: nobody else writes, so the version is the next one.
                truth[len(truth)] = in_old(items)
                assert each_world.upsert("old", ids, vectors, side=side).version == len(truth) - 1
        finally:
            done.set()

    seen = set()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(publish)
        while not done.is_set():
            answer = each_world.search("old", OLD)
            assert found(answer) == truth[answer.snapshot.version]
            seen.add(answer.snapshot.version)
        writing.result()
    assert len(seen) > 3


def test_3_all_scores_of_an_answer_are_in_the_space_that_it_names(world_both_ways: World) -> None:
    """3. In one answer all scores are in one space, over native, derived, forward and backward items."""
    world = world_both_ways
    written = fill(world, requests=2)
    native = numbers(9, 2, 5)
    upgrade = world.start()
    world.upsert("new", ["n0", "n1"], native)
    for _ in range(2):
        world.step(upgrade)
    answer = world.search("new", NEW, **BOTH)
    assert (answer.score_space, answer.coverage) == ("new", (6, 4, 0, 0))
    assert found(answer) == in_new(written) | {f"n{at}": distance(NEW[0], native[at]) for at in range(2)}
    answer = world.search("old", OLD)
    mapped = world.searcher.transforms.get(_artifact(world, "backward"))(native)
    assert (answer.score_space, answer.coverage) == ("old", (8, 0, 2, 0))
    assert found(answer) == in_old(written) | {f"n{at}": distance(OLD[0], mapped[at]) for at in range(2)}


def test_4_an_acknowledged_write_is_seen_by_the_next_search_of_any_process_that_refreshes(
    each_world: World, tmp_path: Path
) -> None:
    """4. An acknowledged write survives, and is seen. (`test_crashes.py` kills at every moment.)"""
    url = each_world.store.settings.database_url
    other = World.open(tmp_path / "data", url)
    written = fill(each_world, requests=1)
    assert found(other.search("old", OLD)) == in_old(written)
    each_world.delete("i0-0")
    assert "i0-0" not in found(other.search("old", OLD))
    other.close()


def test_5_a_deleted_item_stays_deleted_through_upgrade_rollback_and_late_work(each_world: World) -> None:
    """5. A deleted item never comes back: not by an upgrade, a rollback, or a late worker."""
    written = fill(each_world)
    upgrade = each_world.start()
    each_world.step(upgrade)
    held = segment.lease(each_world.store, upgrade, "late")
    assert held is not None
    each_world.delete("i0-0", "i1-1")
    for item in ("i0-0", "i1-1"):
        del written[item]
    work(each_world.store, held)
    assert found(each_world.search("new", NEW, **BOTH)) == in_new(written)
    assert each_world.run(upgrade) is State.COMPLETED
    assert found(each_world.search("new", NEW)) == in_new(written)
    each_world.delete("i2-2")
    del written["i2-2"]
    lifecycle.rollback(each_world.store, upgrade)
    assert found(each_world.search("old", OLD)) == in_old(written)


def test_6_a_snapshot_never_changes_and_every_file_has_its_digest(each_world: World) -> None:
    """6. Columns, indexes and snapshots are immutable, and their digests can be verified."""
    written = fill(each_world)
    seen = each_world.galleries.refresh()
    snapshot = seen.snapshot("photos")
    masks = [view.selected for view in snapshot.segments]
    upgrade = each_world.start()
    each_world.run(upgrade)
    each_world.delete(*list(written)[:5])
    lifecycle.finalize(each_world.store, upgrade)
    each_world.galleries.refresh()
    assert found(each_world.search("old", OLD, seen=seen)) == in_old(written)
    assert [view.selected for view in snapshot.segments] == masks
    with pytest.raises(ValueError, match="read-only"):
        snapshot.segments[0].columns["old"].vectors[0] = 1
    for file, sha256 in _recorded(each_world):
        verify(each_world.store.files, file, sha256)


def test_6_a_changed_byte_is_found_before_an_upgrade_completes(world: World) -> None:
    """6. Digests can be verified: what was written and then damaged is made anew from its source, which was not."""
    fill(world)
    upgrade = world.start()
    while world.state(upgrade) is not State.VERIFYING:
        world.step(upgrade)
    with world.store.catalog.reading() as session:
        file = session.scalars(select(ColumnRow.file).where(ColumnRow.upgrade_id == upgrade)).first()
    path = world.store.files.path(file or "")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    world.step(upgrade)
    assert world.state(upgrade) is State.COMPLETED
    assert not path.exists()
    with world.store.catalog.reading() as session:
        files = list(session.scalars(select(ColumnRow.file).where(ColumnRow.upgrade_id == upgrade)))
    assert whole in [world.store.files.path(each).read_bytes() for each in files]
    assert checks.gallery(world.store.catalog, world.store.files, "photos").problems == []


@pytest.mark.parametrize("cutover", ["progressive", "automatic", "manual"])
def test_7_a_rollback_restores_the_bytes_and_keeps_what_was_written_meanwhile(world: World, cutover: Any) -> None:
    """7. Rollback restores the bytes: the same queries give the same answers as before the upgrade."""
    written = fill(world)
    columns = dict(_recorded(world))
    before = world.search("old", OLD)
    upgrade = world.start(cutover=cutover)
    world.run(upgrade)
    if cutover == "manual":
        lifecycle.cutover(world.store, upgrade)
    assert world.state(upgrade) is State.COMPLETED
    lifecycle.rollback(world.store, upgrade)
    after = world.search("old", OLD)
    assert after.hits(0) == before.hits(0)
    assert after.scores.tobytes() == before.scores.tobytes()
    assert {file: digest(world.store.files.path(file)) for file in columns} == columns == dict(_recorded(world))
    assert stored_files(world.store.files.root) == set(columns)

    upgrade = world.start(cutover=cutover)
    world.step(upgrade)
    world.upsert("old", ["i0-0", "added"], numbers(50, 2, 4), side=numbers(51, 2, 2))
    written |= dict(zip(["i0-0", "added"], zip(numbers(50, 2, 4), numbers(51, 2, 2), strict=True), strict=True))
    world.run(upgrade)
    world.delete("i2-0")
    del written["i2-0"]
    if cutover == "manual":
        lifecycle.cutover(world.store, upgrade)
    lifecycle.rollback(world.store, upgrade)
    assert found(world.search("old", OLD)) == in_old(written)
    assert columns.items() <= dict(_recorded(world)).items()


@pytest.mark.parametrize("kind", ["ivf", "ivf_sq8", "ivf_pq", "hnsw"])
def test_7_a_rollback_restores_the_answers_of_an_index_too(tmp_path: Path, kind: str) -> None:
    """7. Rollback restores the bytes, also of codes that are less exact than the vectors."""
    world = World.open(tmp_path / "data", exact_below=10).prepare(
        ("forward", "old", "new", WITH_SIDE), index={"kind": kind}
    )
    world.upsert("old", [str(row) for row in range(300)], numbers(60, 300, 4), side=numbers(61, 300, 2))
    worker = Worker(world.store, WorkerSettings())
    worker.work()
    before, files = world.search("old", OLD, k=7), stored_files(world.store.files.root)
    upgrade = world.start()
    worker.work()
    assert {view.columns["new"].index.kind for view in world.galleries.refresh().snapshot("photos").segments} == {kind}
    lifecycle.rollback(world.store, upgrade)
    after = world.search("old", OLD, k=7)
    assert after.hits(0) == before.hits(0)
    assert after.scores.tobytes() == before.scores.tobytes()
    assert stored_files(world.store.files.root) == files
    world.close()


def test_7_a_rollback_keeps_items_that_came_in_the_target_model(world: World) -> None:
    """7. Rollback never loses an item; it is refused until that is accepted."""
    fill(world, requests=1)
    upgrade = world.start()
    world.run(upgrade)
    native = numbers(3, 1, 5)
    world.upsert("new", ["native"], native)
    with pytest.raises(errors.NativeItemsWouldBeUnreachable, match="1 items") as refused:
        lifecycle.rollback(world.store, upgrade)
    assert refused.value.details == {"items": 1}
    assert world.state(upgrade) is State.COMPLETED
    lifecycle.rollback(world.store, upgrade, accept_unreachable=True)
    assert found(world.search("new", NEW, **BOTH))["native"] == distance(NEW[0], native[0])
    with pytest.raises(errors.NoRoute):
        world.search("old", OLD)
    answer = world.search("old", OLD, allow_partial=True)
    assert (len(answer.hits(0)), answer.coverage.unreachable) == (4, 1)


def test_8_another_artifact_under_the_same_name_fails_the_upgrade_and_changes_nothing(
    world: World, tmp_path: Path
) -> None:
    """8. An upgrade is pinned to its artifact's digest."""
    written = fill(world)
    upgrade = world.start()
    path = world.store.files.path(artifact_file(_artifact(world, "forward")))
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    fresh = World.open(tmp_path / "data")  # a process that has not loaded it
    fresh.run(upgrade)
    assert fresh.state(upgrade) is State.FAILED
    assert "SHA-256" in (fresh.error(upgrade) or "")
    assert found(fresh.search("old", OLD)) == in_old(written)
    assert {model for view in fresh.galleries.refresh().snapshot("photos").segments for model in view.columns} == {
        "old"
    }
    fresh.close()


def test_8_an_upgrade_that_is_half_done_does_not_go_on_with_another_artifact(world: World, tmp_path: Path) -> None:
    """8. A changed map is never applied to the rest."""
    written = fill(world)
    upgrade = world.start()
    world.step(upgrade)
    world.step(upgrade)
    path = world.store.files.path(artifact_file(_artifact(world, "forward")))
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    fresh = World.open(tmp_path / "data", max_attempts=1)
    fresh.run(upgrade)
    assert fresh.state(upgrade) is State.FAILED
    with fresh.store.catalog.reading() as session:
        assert session.scalar(select(func.count()).where(ColumnRow.upgrade_id == upgrade)) == 1
    lifecycle.cancel(fresh.store, upgrade)
    assert found(fresh.search("old", OLD)) == in_old(written)
    fresh.close()


def test_8_a_later_transformation_is_not_used_for_candidates_of_a_pinned_upgrade(world: World) -> None:
    """8. Pinned, for derived columns and for candidates that are mapped at query time alike: else scores do not compare."""
    written = fill(world)
    upgrade = world.start()
    world.step(upgrade)
    world.step(upgrade)
    world.transformation("later", "old", "new", PLAIN)
    assert found(world.search("new", NEW, **BOTH)) == in_new(written)
    assert world.run(upgrade) is State.COMPLETED
    assert found(world.search("new", NEW)) == in_new(written)


def test_9_work_is_found_in_the_catalog_without_any_message(each_world: World, tmp_path: Path) -> None:
    """9. The catalog is the truth of a job: `due` finds what is to do, and doing too much is harmless."""
    written = fill(each_world)
    upgrade = each_world.start()
    each_world.step(upgrade)
    dead = segment.lease(each_world.store, upgrade, "dead")
    assert dead is not None
    later = World.open(tmp_path / "data", each_world.store.settings.database_url)
    while drive.due(later.store):
        for name in drive.due(later.store):
            later.step(name)
    assert each_world.state(upgrade) is State.RUNNING  # the dead worker's segment is still promised to it
    _expire(each_world, dead)
    while drive.due(later.store):
        for name in drive.due(later.store):
            for _ in range(3):  # a message that is repeated
                later.step(name)
    assert each_world.state(upgrade) is State.COMPLETED
    assert found(each_world.search("new", NEW)) == in_new(written)
    later.close()


def test_10_a_search_without_a_filter_executes_no_statement(each_world: World) -> None:
    """10. Search never touches the catalog's database."""
    fill(each_world)
    upgrade = each_world.start()
    each_world.step(upgrade)
    each_world.step(upgrade)
    seen = each_world.galleries.refresh()
    statements: list[str] = []
    event.listen(each_world.store.catalog.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    answer = each_world.search("new", NEW, seen=seen, **BOTH)
    assert (answer.coverage.direct, answer.coverage.forward) == (4, 8)
    assert len(answer.hits(0)) == 12
    assert statements == []
    each_world.search("new", NEW, seen=seen, filter={"id": "i0-0"}, **BOTH)
    assert statements  # the listener listens


def test_11_a_worker_that_lost_its_lease_publishes_nothing(each_world: World) -> None:
    """11. Of two workers that hold the same segment only the current lease holder can publish."""
    written = fill(each_world, requests=1)
    upgrade = each_world.start()
    each_world.step(upgrade)
    frozen = segment.lease(each_world.store, upgrade, "frozen")
    assert frozen is not None
    _expire(each_world, frozen)
    taken = segment.lease(each_world.store, upgrade, "second")
    assert taken is not None
    assert (taken.segment_id, taken.fence) == (frozen.segment_id, frozen.fence + 1)

    # Thawed while the second is at work, and after it is done: refused both times.
    files, version = stored_files(each_world.store.files.root), each_world.version()
    with pytest.raises(errors.LeaseLost):
        work(each_world.store, frozen)
    assert stored_files(each_world.store.files.root) == files
    assert each_world.version() == version
    work(each_world.store, taken)
    files, version = stored_files(each_world.store.files.root), each_world.version()
    for late in (frozen, taken):
        with pytest.raises(errors.LeaseLost):
            work(each_world.store, late)
    assert stored_files(each_world.store.files.root) == files
    assert each_world.version() == version
    assert each_world.run(upgrade) is State.COMPLETED
    assert found(each_world.search("new", NEW)) == in_new(written)


def test_11_two_workers_at_once_do_every_segment_once(each_world: World, tmp_path: Path) -> None:
    """11. Doing a segment twice equals doing it once, and no two workers lease the same one."""
    written = fill(each_world, requests=6, each=2)
    upgrade = each_world.start()
    each_world.step(upgrade)
    workers = [World.open(tmp_path / "data", each_world.store.settings.database_url) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda at: workers[at].run(upgrade, f"worker-{at}"), range(2)))
    assert each_world.run(upgrade) is State.COMPLETED
    with each_world.store.catalog.reading() as session:
        rows = session.scalars(select(UpgradeSegmentRow)).all()
        assert [(row.state, row.attempts, row.fence) for row in rows] == [("done", 1, 1)] * 6
    assert found(each_world.search("new", NEW)) == in_new(written)
    for world in workers:
        world.close()


@pytest.mark.parametrize("verb", [lifecycle.cancel, removal.delete_gallery], ids=["cancel", "delete_gallery"])
def test_11_a_worker_whose_upgrade_is_gone_publishes_nothing(each_world: World, verb: Callable[..., Any]) -> None:
    """11. The upgrade no longer wants the segment: nothing was changed."""
    fill(each_world, requests=1)
    upgrade = each_world.start()
    each_world.step(upgrade)
    held = segment.lease(each_world.store, upgrade, "worker")
    assert held is not None
    verb(each_world.store, upgrade if verb is lifecycle.cancel else "photos")
    files = stored_files(each_world.store.files.root)
    with pytest.raises(errors.LeaseLost):
        work(each_world.store, held)
    assert stored_files(each_world.store.files.root) == files


def test_11_a_segment_whose_workers_die_is_set_aside_and_the_rest_goes_on(each_world: World) -> None:
    """11. A segment that kills its workers does not kill them all; retry gives it another chance."""
    written = fill(each_world, requests=2)
    upgrade = each_world.start()
    each_world.step(upgrade)
    for attempt in range(each_world.store.settings.max_attempts):
        held = segment.lease(each_world.store, upgrade, f"dies-{attempt}")
        assert held is not None
        _expire(each_world, held)
    assert each_world.run(upgrade) is State.FAILED
    assert "1 segments failed" in (each_world.error(upgrade) or "")
    assert found(each_world.search("new", NEW, **BOTH)) == in_new(written)
    assert lifecycle.retry(each_world.store, upgrade).changed
    assert each_world.run(upgrade) is State.COMPLETED
    assert found(each_world.search("new", NEW)) == in_new(written)


def test_12_a_second_upgrade_is_refused_by_a_message_and_by_the_database(each_world: World) -> None:
    """12. Only one active upgrade per gallery, enforced by the database."""
    fill(each_world, requests=1)
    upgrade = each_world.start()
    with pytest.raises(errors.UpgradeInProgress, match="pending"):
        each_world.start()
    with each_world.store.catalog.reading() as session:
        row = upgrade_row(session, upgrade)
        copy = {column.key: getattr(row, column.key) for column in UpgradeRow.__table__.columns}
    with pytest.raises(IntegrityError), each_world.store.catalog.transaction() as tx:
        tx.session.add(UpgradeRow(**{**copy, "id": "0" * 26}))


def test_12_of_upgrades_that_start_at_once_one_wins(each_world: World) -> None:
    """12. Likewise under a race."""
    fill(each_world, requests=1)
    barrier = threading.Barrier(4)

    def start(_: int) -> str:
        barrier.wait()
        try:
            return each_world.start()
        except errors.UpgradeInProgress:
            return "refused"

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(start, range(4)))[1:] == ["refused"] * 3


def test_12_a_dry_run_that_is_active_refuses_another_upgrade_with_the_same_message(each_world: World) -> None:
    """12. A dry run is an upgrade too."""
    fill(each_world, requests=1)
    each_world.start(dry_run=True)
    with pytest.raises(errors.UpgradeInProgress, match="pending"):
        each_world.start()


def _artifact(world: World, transformation: str) -> str:
    registry = world.galleries.refresh().registry
    return next(t.artifact for t in registry.transformations if t.name == transformation)


def _expire(world: World, held: Lease) -> None:
    with world.store.catalog.transaction() as tx:
        tx.session.execute(
            update(UpgradeSegmentRow)
            .where(UpgradeSegmentRow.segment_id == held.segment_id)
            .values(leased_until=datetime(2000, 1, 1, tzinfo=UTC))
        )


def _recorded(world: World) -> Iterator[tuple[str, str]]:
    """Every file that the catalog names, with its digest."""
    with world.store.catalog.reading() as session:
        for column in session.scalars(select(ColumnRow)):
            yield column.file, column.sha256
        for row in session.scalars(select(SegmentRow)):
            yield row.ids_file, row.ids_sha256
            if row.side_file is not None and row.side_sha256 is not None:
                yield row.side_file, row.side_sha256
