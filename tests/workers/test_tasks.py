"""What a worker does when it is told to look."""

from __future__ import annotations

import errno
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from celery import Celery
from sqlalchemy import event, select

from gallery import repair
from gallery.catalog import latencies, probes
from gallery.catalog.compactions import Look
from gallery.catalog.galleries import gallery_row
from gallery.catalog.holdings import holdings
from gallery.catalog.tables import ColumnRow, GalleryRow, SegmentRow
from gallery.catalog.upgrades import counts
from gallery.compact import merge
from gallery.files import Files
from gallery.store import Store
from gallery.transforms import Transforms
from gallery.upgrade import lifecycle
from gallery.upgrade.states import State
from tests.acceptance.system import wait_for
from tests.gallery.world import GALLERY, PLAIN, WITH_SIDE, Linear, World, load, lost_connection
from workers.app import WORK
from workers.settings import WorkerSettings
from workers.tasks import Worker, register, watch


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    opened = World.open(tmp_path / "data", exact_below=4).prepare(
        ("forward", "old", "new", WITH_SIDE), index={"kind": "hnsw"}
    )
    yield opened
    opened.close()


@pytest.fixture
def worker(world: World) -> Worker:
    return Worker(world.store, WorkerSettings(orphan_seconds=60))


def fill(world: World) -> None:
    random = np.random.default_rng(0)
    world.upsert("old", [f"i{row}" for row in range(50)], random.random((50, 4)), side=random.random((50, 2)))


def kinds(world: World) -> dict[str, str]:
    (snapshot,) = world.galleries.refresh().galleries.values()
    (segment,) = snapshot.segments
    return {model: column.index.kind for model, column in segment.columns.items()}


def test_it_builds_the_index_of_a_large_segment_and_searches_find_the_same(world: World, worker: Worker) -> None:
    fill(world)
    query = np.full((1, 4), 0.5)
    exact = [hit.id for hit in world.search("old", query, k=5).hits(0)]
    assert kinds(world) == {"old": "flat"}
    worker.work()
    assert kinds(world) == {"old": "hnsw"}
    assert [hit.id for hit in world.search("old", query, k=5).hits(0)] == exact
    assert not worker.has_work()


def test_it_takes_an_upgrade_from_its_start_to_its_end(world: World, worker: Worker) -> None:
    fill(world)
    upgrade = world.start()
    assert worker.has_work()
    worker.work()
    assert world.state(upgrade) is State.COMPLETED
    assert kinds(world) == {"old": "hnsw", "new": "hnsw"}
    assert not worker.has_work()


def test_an_upgrade_costs_the_catalog_the_same_however_many_are_under_way_beside_it(
    world: World, worker: Worker
) -> None:
    asked, each = list[str](), list[float]()
    event.listen(world.store.catalog.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    for beside in (4, 32):
        for name in (f"{beside}-{at}" for at in range(beside)):
            world.make(name)
            world.upsert("old", ["a"], np.ones((1, 4)), side=np.ones((1, 2)), gallery=name)
            world.start(gallery=name)
        asked.clear()
        worker.work()
        assert not worker.has_work()
        each.append(len(asked) / beside)
    few, many = each
    assert many < 1.2 * few


@pytest.mark.parametrize("at", ["validating", "verifying"])
def test_a_connection_that_is_lost_while_an_upgrade_is_judged_costs_a_step_and_no_upgrade(
    tmp_path: Path, postgres_url: str, at: str
) -> None:
    world = World.open(tmp_path / "data", postgres_url).prepare(("forward", "old", "new", PLAIN))
    world.upsert("old", ["a", "b"], np.eye(2, 4))
    probe = {"old": np.ones(4, np.float32), "new": np.ones(5, np.float32)}
    with world.store.catalog.transaction() as tx:
        probes.replace(tx.session, gallery_row(tx.session, "photos").id, [(probe, None)])
    upgrade = world.start()
    while at == "verifying" and world.state(upgrade) != at:
        world.step(upgrade)
    worker = Worker(world.store, WorkerSettings())
    with lost_connection(world.store.catalog, before="FROM probes"):
        worker.work()
    assert (world.state(upgrade), world.error(upgrade)) == (at, None)
    worker.work()
    assert (world.state(upgrade), world.error(upgrade)) == (State.COMPLETED, None)
    world.close()


def test_it_stops_between_two_steps_when_it_is_told_to(world: World, worker: Worker) -> None:
    fill(world)
    upgrade = world.start()
    worker.stop()
    worker.work()
    assert world.state(upgrade) is State.PENDING


def test_it_looks_by_itself_so_that_a_lost_message_costs_only_time(world: World, worker: Worker) -> None:
    thread = watch(worker, seconds=0.01)
    fill(world)
    upgrade = world.start()
    wait_for(lambda: world.state(upgrade) is State.COMPLETED, 20, lambda: str(world.state(upgrade)))
    worker.stop()
    thread.join(20)
    assert not thread.is_alive()


def test_a_nudge_makes_it_look_at_once_and_that_is_all_that_it_does(world: World, worker: Worker) -> None:
    app = Celery(set_as_current=False)
    register(app, worker)
    thread = watch(worker, seconds=3600)
    fill(world)
    upgrade = world.start()
    app.tasks[WORK]()
    wait_for(lambda: world.state(upgrade) is State.COMPLETED, 20, lambda: str(world.state(upgrade)))
    worker.stop()
    thread.join(20)
    assert not thread.is_alive(), "it waits for its hour"


def test_a_signal_may_stop_it_whatever_that_interrupts(worker: Worker) -> None:
    def interrupted(*_: object) -> object:
        """As a signal's handler it comes between two lines, of the standard library too."""
        worker.stop()
        return interrupted

    def main() -> None:
        sys.settrace(interrupted)
        worker.nudge()
        worker.stop()
        sys.settrace(None)

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for what it interrupted"


class Unnudged(Worker):
    """Nobody waits; told to stop at the second look."""

    asked: list[float]

    def nudged(self, seconds: float) -> bool:
        """Note for how long."""
        self.asked.append(seconds)
        if len(self.asked) > 1:
            self.stop()
        return False


@pytest.mark.parametrize(
    ("throttle", "waits"), [({"items_per_second": 0.05}, 1000), ({"max_search_p99_ms": 50}, 3600)], ids=str
)
def test_it_looks_again_as_soon_as_a_throttle_lets_an_upgrade_go_on(
    world: World, throttle: dict[str, float], waits: float
) -> None:
    fill(world)
    upgrade = world.start(throttle=throttle)
    while world.state(upgrade) is not State.RUNNING:
        world.step(upgrade)
    if "max_search_p99_ms" in throttle:
        with world.store.catalog.transaction() as tx:
            latencies.publish(tx.session, "api", {1: 62.0})
    worker = Unnudged(world.store, WorkerSettings())
    worker.asked = []
    worker.work()
    watch(worker, seconds=3600).join(20)
    assert worker.asked == [0, pytest.approx(waits, abs=60)]


def test_it_reclaims_what_a_crash_left_behind_and_nothing_else(world: World, worker: Worker) -> None:
    fill(world)
    root = world.store.files.root
    known = {path for path in root.rglob("*") if path.is_file() and path.parent.parent.name == "columns"}
    orphan, young = (root / "columns" / "1" / name for name in ("orphan.npy", "young.npy.part"))
    for path in (orphan, young):
        path.write_bytes(b"x")
    long_ago = time.time() - 3600
    for path in (orphan, *known):
        os.utime(path, (long_ago, long_ago))
    worker._swept = -1e9
    worker.work()
    assert not orphan.exists()
    assert young.exists()
    assert all(path.exists() for path in known)


def test_an_orphan_that_the_system_does_not_let_it_remove_fails_no_upgrade_that_it_checks(tmp_path: Path) -> None:
    class Guarded(Files):
        def remove_unknown(self, *_: Any, **__: Any) -> list[str]:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    world = World.open(tmp_path / "data", files=Guarded).prepare(("forward", "old", "new", PLAIN))
    world.upsert("old", ["a"], np.ones((1, 4)))
    with world.store.catalog.transaction() as tx:
        probe = {"old": np.ones(4, np.float32), "new": np.ones(5, np.float32)}
        probes.replace(tx.session, gallery_row(tx.session, GALLERY).id, [(probe, None)])
    orphan = world.store.files.root / "columns" / "1" / "orphan.npy"
    orphan.touch()
    os.utime(orphan, (0, 0))
    upgrade = world.start()
    hours = itertools.count(step=3600.0)
    Worker(world.store, WorkerSettings(), clock=lambda: next(hours)).work()
    assert (world.state(upgrade), world.error(upgrade)) == (State.COMPLETED, None)
    world.close()


def small(world: World, requests: int) -> None:
    random = np.random.default_rng(1)
    for at in range(requests):
        world.upsert("old", [f"s{at}"], random.random((1, 4)), side=random.random((1, 2)))


def rows(world: World) -> list[int]:
    (snapshot,) = world.galleries.refresh().galleries.values()
    return [segment.rows for segment in snapshot.segments]


def tear(world: World, gallery: str) -> None:
    """Cut the native column of a gallery off."""
    with world.store.catalog.reading() as session:
        chosen = select(ColumnRow.file).join(SegmentRow).join(GalleryRow).where(GalleryRow.name == gallery)
        path = world.store.files.path(session.scalars(chosen).one())
    os.truncate(path, path.stat().st_size // 2)


def test_a_column_that_cannot_be_read_keeps_no_other_from_its_index(world: World, worker: Worker) -> None:
    fill(world)
    world.make("whole", index={"kind": "hnsw"})
    world.upsert("old", [str(row) for row in range(10)], np.ones((10, 4)), side=np.ones((10, 2)), gallery="whole")
    tear(world, "photos")
    worker.work()
    (segment,) = world.galleries.refresh().snapshot("whole").segments
    assert segment.columns["old"].index.kind == "hnsw"
    assert not worker.has_work()


class Full(Files):
    """A disk on which nothing can be written once it is `full`."""

    full = False

    def writing(self, name: str) -> Any:
        """Refuse."""
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().writing(name)


def test_a_full_disk_does_not_keep_it_from_removing_what_fills_it(tmp_path: Path) -> None:
    world = World.open(tmp_path / "data", files=Full, exact_below=4).prepare(index={"kind": "hnsw"})
    worker = Worker(world.store, WorkerSettings(retired_seconds=3600))
    for at in range(2):
        world.upsert("old", [f"s{at}"], np.ones((1, 4)))
    merge.ask(world.store, "photos")
    worker.work()
    world.upsert("old", [str(row) for row in range(10)], np.ones((10, 4)))
    world.store.files.full = True
    worker.settings = worker.settings.model_copy(update={"retired_seconds": 1e-9})
    assert merge.reclaimable(world.store, 1e-9)
    merge.ask(world.store, "photos")
    worker.work()
    assert not merge.reclaimable(world.store, 1e-9)
    assert not worker.has_work()  # neither the index nor the merge is tried again at once,
    (look,) = merge.looked(world.store)
    assert look.asked_at is not None  # and what was asked for is not forgotten
    world.store.files.full = False
    worker._unmerged.clear()
    worker._unindexed.clear()
    worker.work()
    assert rows(world) == [12]
    assert not worker.has_work()
    world.close()


def test_for_an_upgrade_it_opens_no_other_gallery_of_which_there_may_be_thousands(tmp_path: Path) -> None:
    opened: list[str] = []

    class Noted(Files):
        def path(self, name: str) -> Path:
            opened.append(name)
            return super().path(name)

    world = World.open(tmp_path / "data", files=Noted).prepare(("forward", "old", "new", WITH_SIDE))
    world.make("another")
    for gallery in ("photos", "another"):
        world.upsert("old", ["a", "b"], np.eye(2, 4), side=np.eye(2), gallery=gallery)
    opened.clear()
    upgrade = world.start()
    Worker(world.store, WorkerSettings()).work()
    assert world.state(upgrade) is State.COMPLETED
    assert {name.split("/")[1] for name in opened if name.startswith("columns/")} == {"1"}
    world.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has mapped")
def test_what_was_removed_is_not_mapped_by_it_any_more(world: World, worker: Worker, tmp_path: Path) -> None:
    fill(world)
    upgrade = world.start()
    worker.work()
    lifecycle.finalize(world.store, upgrade)
    worker.work()
    mapped = Path("/proc/self/maps").read_text().splitlines()
    assert [line for line in mapped if str(tmp_path) in line and line.endswith("(deleted)")] == []


def test_it_merges_small_segments_once_enough_have_piled_up(world: World, worker: Worker) -> None:
    worker._rule = worker._rule._replace(segments=3)
    small(world, 2)
    assert not worker.has_work()
    small_before = rows(world)
    worker.work()
    assert rows(world) == small_before == [1, 1]
    world.upsert("old", ["s2"], [[1, 2, 3, 4]], side=[[1, 2]])
    assert worker.has_work()
    worker.work()
    assert rows(world) == [3]
    assert not worker.has_work()


def test_it_merges_what_it_was_asked_to_and_says_so(world: World, worker: Worker) -> None:
    small(world, 2)
    assert not worker.has_work()
    merge.ask(world.store, "photos")
    assert worker.has_work()
    worker.work()
    assert rows(world) == [2]
    assert [look.asked_at for look in merge.looked(world.store)] == [None]
    assert not worker.has_work()


def test_what_it_was_asked_to_merge_during_an_upgrade_is_merged_once_that_is_over(world: World, worker: Worker) -> None:
    small(world, 2)
    upgrade = world.start()
    lifecycle.pause(world.store, upgrade)
    merge.ask(world.store, "photos")
    worker.work()
    assert rows(world) == [1, 1]
    assert not worker.has_work(), "or it would look again and again"
    lifecycle.cancel(world.store, upgrade)
    assert worker.has_work()
    worker.work()
    assert rows(world) == [2]
    assert [look.asked_at for look in merge.looked(world.store)] == [None]


def test_what_there_is_to_merge_is_seen_as_soon_as_deleted_rows_that_were_counted_wrong_are_counted_anew(
    world: World, worker: Worker
) -> None:
    fill(world)
    worker.work()
    world.delete(*(f"i{row}" for row in range(50)))
    with world.store.catalog.transaction() as tx:
        tx.session.scalars(select(SegmentRow)).one().dead = 0
    assert not worker.has_work()
    repair.gallery(world.store, GALLERY)
    assert worker.has_work()
    worker.work()
    assert rows(world) == []


def test_it_keeps_merged_segments_for_a_while_and_then_removes_them(world: World, worker: Worker) -> None:
    small(world, 2)
    merge.ask(world.store, "photos")
    worker.work()
    columns = world.store.files.root / "columns"
    assert len(list(columns.rglob("*.npy"))) == 9
    worker.settings = worker.settings.model_copy(update={"retired_seconds": 1e-9})
    assert worker.has_work()
    worker.work()
    assert len(list(columns.rglob("*.npy"))) == 3
    assert not worker.has_work()


def test_it_removes_them_although_its_work_never_ends(world: World) -> None:
    moments = itertools.count(step=3600.0)

    def clock() -> float:
        """An hour passes at each look, and something new was written; at last it is told to stop."""
        moment = next(moments)
        small(world, 1)
        if moment > 20 * 3600:
            worker.stop()
        return moment

    small(world, 2)
    worker = Worker(world.store, WorkerSettings(compact_segments=2, retired_seconds=1e-3), clock=clock)
    worker.work()
    with world.store.catalog.reading() as session:
        assert session.get(SegmentRow, 1) is None


def test_an_upgrade_makes_way_now_and_then_for_one_merge_and_goes_on(world: World) -> None:
    passed, waiting = 0.0, list[int]()

    def waits(gallery: str) -> bool:
        with world.store.catalog.reading() as session:
            row = gallery_row(session, gallery).id
            return holdings(session, [row])[row].segments > 1

    @dataclass(frozen=True)
    class Slow(Linear):
        """Takes three seconds for a segment."""

        def __call__(self, embeddings: Any, side: Any = None) -> Any:
            """Note what waits meanwhile."""
            nonlocal passed
            passed += 3
            waiting.append(sum(waits(name) for name in "ab"))
            return super().__call__(embeddings, side)

    def load_slowly(path: Path) -> Slow:
        return Slow(*astuple(load(path)))

    small(world, 12)
    for gallery in "ab":
        world.make(gallery)
        for at in range(4):
            world.upsert("old", [str(at)], np.ones((1, 4)), side=np.ones((1, 2)), gallery=gallery)
    upgrade = world.start()
    world.store = replace(world.store, transforms=Transforms(world.store.files, load_slowly))
    Worker(world.store, WorkerSettings(compact_segments=4), clock=lambda: passed).work()
    assert world.state(upgrade) is State.COMPLETED
    assert (waiting[0], waiting[-1]) == (2, 0)
    assert 1 in waiting, "both in one turn"


def test_one_lane_at_a_time_looks_for_what_an_upgrade_must_make_way_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed, looking, met, looked = 0.0, list[object](), threading.Event(), merge.looked

    @dataclass(frozen=True)
    class Slow(Linear):
        """Takes so long for a segment that a look is due after each."""

        def __call__(self, embeddings: Any, side: Any = None) -> Any:
            """Let time pass."""
            nonlocal passed
            passed += 10
            return super().__call__(embeddings, side)

    def load_slowly(path: Path) -> Slow:
        return Slow(*astuple(load(path)))

    def look(store: Store) -> list[Look]:
        looking.append(found := looked(store))
        if len(looking) > 1:
            met.set()
        elif world.state(upgrade) is State.RUNNING:
            met.wait(0.5)  # for another that looks at the same time
        looking.pop()
        return found

    small(world, 4)
    upgrade = world.start()
    world.store = replace(world.store, transforms=Transforms(world.store.files, load_slowly))
    monkeypatch.setattr(merge, "looked", look)
    Worker(world.store, WorkerSettings(), clock=lambda: passed).work()
    assert world.state(upgrade) is State.COMPLETED
    assert not met.is_set()


def test_where_one_gallery_is_written_to_all_the_time_another_is_merged_beside_an_upgrade_too(world: World) -> None:
    passed, waiting = 0.0, list[int]()

    @dataclass(frozen=True)
    class Slow(Linear):
        """Takes three seconds for a segment."""

        def __call__(self, embeddings: Any, side: Any = None) -> Any:
            """Write as much as one merge takes, and note what waits meanwhile."""
            nonlocal passed
            passed += 3
            for at in range(4):
                world.upsert("old", [f"{len(waiting)}-{at}"], np.ones((1, 4)), gallery="written")
            with world.store.catalog.reading() as session:
                row = gallery_row(session, "waits").id
                waiting.append(holdings(session, [row])[row].segments)
            return super().__call__(embeddings, side)

    def load_slowly(path: Path) -> Slow:
        return Slow(*astuple(load(path)))

    small(world, 12)
    for gallery in ("written", "waits"):
        world.make(gallery)
    for at in range(4):
        world.upsert("old", [str(at)], np.ones((1, 4)), gallery="waits")
    world.start()
    world.store = replace(world.store, transforms=Transforms(world.store.files, load_slowly))
    Worker(world.store, WorkerSettings(compact_segments=4), clock=lambda: passed).work()
    assert (waiting[0], waiting[-1]) == (4, 1)


@pytest.mark.parametrize("written", [False, True])
def test_while_it_checks_an_upgrade_all_others_that_run_go_on(world: World, written: bool) -> None:
    """To check one with probes is to map its whole gallery. Where a gallery is written to all the time, a merge is always due."""
    passed, seen, retired = 0.0, list[tuple[State, list[int]]](), list[int]()

    @dataclass(frozen=True)
    class Slow(Linear):
        """Takes three seconds for a segment."""

        def __call__(self, embeddings: Any, side: Any = None) -> Any:
            """Note how far both are."""
            nonlocal passed
            passed += 3
            with world.store.catalog.reading() as session:
                done = [counts(session, each).segments.get("done", 0) for each in running]
                left = session.scalars(select(SegmentRow.id).where(SegmentRow.retired_at.is_not(None))).all()
            seen.append((world.state(checked), done))
            retired.append(len(left))
            for _ in range(2 if written else 0):
                world.upsert("old", [str(len(seen))], np.ones((1, 4)), gallery="written")
            return super().__call__(embeddings, side)

    def load_slowly(path: Path) -> Slow:
        return Slow(*astuple(load(path)))

    for name in ("one", "other", "written"):
        world.make(name)
    for gallery, segments in ((GALLERY, 12), ("one", 8), ("other", 8)):
        for at in range(segments):
            world.upsert("old", [str(at)], np.ones((1, 4)), side=np.ones((1, 2)), gallery=gallery)
    with world.store.catalog.transaction() as tx:
        probe = {"old": np.ones(4, np.float32), "new": np.ones(5, np.float32)}
        probes.replace(tx.session, gallery_row(tx.session, GALLERY).id, [(probe, None)])
    running = [world.start(gallery=gallery) for gallery in ("one", "other")]
    assert all(world.step(each) for each in running)
    checked = world.start()
    world.store = replace(world.store, transforms=Transforms(world.store.files, load_slowly))
    Worker(world.store, WorkerSettings(compact_segments=2, retired_seconds=1e-3), clock=lambda: passed).work()
    assert {world.state(each) for each in (*running, checked)} == {State.COMPLETED}
    meanwhile = [done for state, done in seen if state is State.VALIDATING]
    assert all(last > first for first, last in zip(meanwhile[0], meanwhile[-1], strict=True))
    merged = [left for left, (state, _) in zip(retired, seen, strict=True) if state is State.VALIDATING]
    assert (max(merged) > 0, merged[-1]) == (written, 0), "what was merged meanwhile is removed meanwhile"


def test_a_damaged_segment_is_not_merged_and_does_not_stop_the_rest(world: World, worker: Worker) -> None:
    small(world, 2)
    (snapshot,) = world.galleries.refresh().galleries.values()
    with world.store.catalog.reading() as session:  # what came from outside: nothing here can make it anew
        path = world.store.files.path(
            session.scalars(select(ColumnRow.file).where(ColumnRow.origin == "native")).first() or ""
        )
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    merge.ask(world.store, "photos")
    worker.work()
    assert len(rows(world)) == len(snapshot.segments) == 2
    assert not worker.has_work()
    (look,) = merge.looked(world.store)
    assert look.asked_at is not None  # it is not done
