"""Writes that meet are one commit: each with its own outcome, and all as if they had come one after the other."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event, func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from gallery import errors, ingest
from gallery.catalog import galleries as gallery_rows
from gallery.catalog.tables import ItemRow, SegmentRow
from gallery.group_commit import GroupCommit
from gallery.ingest import Upserted
from gallery.new_items import NewItems
from tests.gallery.gathering import WAIT, Watched
from tests.gallery.world import GALLERY, OLD, SIDE, World, found


def items(*ids: str, at: float = 1.0, model: str = "old", **more: Any) -> NewItems:
    """Items that lie next to each other, with side-information unless something else is said."""
    n = len(ids)
    vectors = np.full((n, OLD), at, np.float32) + np.arange(n, dtype=np.float32)[:, None]
    chosen = {"side": np.ones((n, SIDE), np.float32), "payloads": [{"id": each} for each in ids], **more}
    return NewItems(model, ids, chosen.pop("embeddings", vectors), **chosen)


#: items to write, or ids to delete
Request = NewItems | Sequence[str]


class Crowd:
    """Clients that write to a gallery whose commits are held up until they all have come."""

    def __init__(self, world: World, pool: ThreadPoolExecutor) -> None:
        self.world = world
        self.together = Watched(1)
        self.commits = GroupCommit(world.store, self.together)
        self._pool = pool
        #: of what holds them up
        self.session: Session

    def start(self, request: Request) -> Future[Any]:
        act = self.commits.upsert if isinstance(request, NewItems) else self.commits.delete
        return self._pool.submit(act, GALLERY, request)

    @contextmanager
    def gathered(self, *requests: Request) -> Iterator[list[Future[Any]]]:
        """The outcomes of requests, of which the first is under way, and the others wait, until the block ends."""
        with self.world.store.catalog.transaction() as tx:  # SQLite's lock is taken by now; PostgreSQL's with a row
            self.session = tx.session
            gallery_rows.lock(tx.session, gallery_rows.gallery_row(tx.session, GALLERY).id)
            outcomes = [self.start(requests[0])]
            assert self.together.one_more_leads()
            for request in requests[1:]:
                outcomes.append(self.start(request))
                assert self.together.one_more_waits()
            yield outcomes

    def outcomes(self, *requests: Request) -> list[Any]:
        """Of requests that met, none of them refused."""
        with self.gathered(*requests) as outcomes:
            pass
        return [outcome.result(WAIT) for outcome in outcomes]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as threads:
        yield threads


def contents(world: World) -> dict[str, Any]:
    """By id the payload, the vector and the side-information of every live item."""
    (snapshot,) = (each for name, each in world.galleries.refresh().galleries.items() if name == GALLERY)
    views = {view.id: view for view in snapshot.segments}
    with world.store.catalog.reading() as session:
        rows = session.scalars(select(ItemRow).where(ItemRow.deleted_version.is_(None))).all()
    seen = {}
    for row in rows:
        view = views[row.segment_id]
        assert row.item_id not in seen
        assert view.ids[row.row] == row.item_id
        side = None if view.side is None else view.side[row.row].tolist()
        seen[row.item_id] = (row.payload, view.columns["old"].vectors[row.row].tolist(), side)
    return seen


def segments(world: World) -> int:
    """How many segments the catalog has."""
    with world.store.catalog.reading() as session:
        return session.scalar(select(func.count()).select_from(SegmentRow)) or 0


def test_upserts_that_meet_are_one_commit_and_each_hears_of_its_own(
    each_world: World, pool: ThreadPoolExecutor
) -> None:
    crowd = Crowd(each_world, pool)
    first, *met = crowd.outcomes(items("a"), items("b", "c", at=10), items("d", at=20), items("e", at=30))
    assert [each.upserted for each in (first, *met)] == [1, 2, 1, 1]
    assert {each.version for each in met} == {first.version + 1} == {each_world.version()}
    assert segments(each_world) == 2
    answer = each_world.search("old", np.zeros((1, OLD)))
    assert found(answer) == {"a": 2.0, "b": 20.0, "c": 22.0, "d": 40.0, "e": 60.0}
    assert contents(each_world)["c"] == ({"id": "c"}, [11.0] * OLD, [1.0] * SIDE)
    assert crowd.together.idle


def test_a_lone_upsert_is_a_commit_of_its_own_in_its_own_thread(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, upsert_each = list[int](), ingest.upsert_each

    def noted(*given: Any) -> Any:
        threads.append(threading.get_ident())
        return upsert_each(*given)

    monkeypatch.setattr(ingest, "upsert_each", noted)
    commits = GroupCommit(world.store, Watched(1))
    versions = [commits.upsert(GALLERY, items(each)).version for each in "abc"]
    assert versions == [versions[0], versions[0] + 1, versions[0] + 2]
    assert threads == [threading.get_ident()] * 3


def test_who_is_refused_hears_what_he_would_alone_and_the_others_are_written(
    each_world: World, pool: ThreadPoolExecutor
) -> None:
    nan = np.array([[1, 1, 1, 1], [1, np.nan, 1, 1]], np.float32)
    bad = {
        errors.InvalidVector: items("v", "w", embeddings=nan),
        errors.DimensionMismatch: items("x", embeddings=np.ones((1, OLD + 1), np.float32)),
        errors.DuplicateId: items("y", "y"),
        errors.InvalidItem: items("z", payloads=[{"a": float("nan")}]),
    }
    crowd, before = Crowd(each_world, pool), each_world.version()
    with crowd.gathered(items("a"), items("b"), *bad.values(), items("c")) as outcomes:
        pass
    assert [outcomes[at].result(WAIT).version - before for at in (0, 1, -1)] == [1, 2, 2]
    for outcome, (error, request) in zip(outcomes[2:-1], bad.items(), strict=True):
        met = outcome.exception(WAIT)
        with pytest.raises(error) as alone:
            ingest.upsert(each_world.store, GALLERY, request)
        assert isinstance(met, error)
        assert (str(met), met.pointer) == (str(alone.value), alone.value.pointer)
    assert contents(each_world).keys() == {"a", "b", "c"}


def test_of_two_writes_of_an_item_the_later_one_stays(each_world: World, pool: ThreadPoolExecutor) -> None:
    crowd = Crowd(each_world, pool)
    met = crowd.outcomes(items("a"), items("b", "c"), items("d"), items("c", "e", at=7), items("f"))
    first = met[0].version
    assert [each.version - first for each in met] == [0, 1, 1, 2, 2]
    assert contents(each_world)["c"][1] == [7.0] * OLD


def test_a_commit_has_no_more_items_than_a_request_of_many_would(world: World, pool: ThreadPoolExecutor) -> None:
    crowd = Crowd(world, pool)
    of_sixty = [items(*(f"{request}-{at}" for at in range(60))) for request in range(20)]
    versions = [each.version for each in crowd.outcomes(items("first"), *of_sixty)]
    assert [versions.count(version) for version in sorted(set(versions))] == [1, 16, 4]
    assert len(contents(world)) == 1 + 20 * 60


def test_a_request_of_many_items_waits_for_no_commit_of_others_and_none_waits_for_it(
    world: World, pool: ThreadPoolExecutor
) -> None:
    crowd = Crowd(world, pool)
    with crowd.gathered(items("a"), items("b")) as outcomes:
        many = crowd.start(items(*(f"m{at}" for at in range(65))))
    versions = [each.result(WAIT).version for each in (*outcomes, many)]
    assert len(set(versions)) == 3


def test_items_of_two_models_are_two_commits(each_world: World, pool: ThreadPoolExecutor) -> None:
    crowd = Crowd(each_world, pool)
    each_world.run(each_world.start())
    with crowd.gathered(items("a"), items("b")) as outcomes:
        new = crowd.start(items("n", model="new", embeddings=np.ones((1, 5), np.float32), side=None))
        assert crowd.together.one_more_leads(), "it waits although it cannot be written with the others"
    assert len({each.result(WAIT).version for each in (*outcomes, new)}) == 3


def test_deletes_that_meet_are_one_commit_and_an_item_is_deleted_once(
    each_world: World, pool: ThreadPoolExecutor
) -> None:
    each_world.upsert("old", list("abcde"), np.ones((5, OLD)))
    crowd, before = Crowd(each_world, pool), each_world.version()
    told = crowd.outcomes(["a"], ["b", "c", "b"], ["no", "c", "a"], ["d", "d"])
    assert told == [(1, []), (2, []), (0, ["no", "c", "a"]), (1, [])]
    assert each_world.version() == before + 2
    assert contents(each_world).keys() == {"e"}


def test_a_commit_deletes_no_more_than_a_request_of_many_would(world: World, pool: ThreadPoolExecutor) -> None:
    before, of_sixty = world.version(), [[f"{request}-{at}" for at in range(60)] for request in range(20)]
    assert Crowd(world, pool).outcomes(["first"], *of_sixty)[1:] == [(0, ids) for ids in of_sixty]
    assert world.version() == before + 1 + 2


@pytest.mark.parametrize("write", [[items("a"), items("b"), items("c")], [["a"], ["b"], ["c"]]])
def test_where_a_commit_fails_as_a_whole_each_finds_out_alone(
    each_world: World, pool: ThreadPoolExecutor, write: list[Any]
) -> None:
    crowd = Crowd(each_world, pool)
    with crowd.gathered(*write) as outcomes:
        gallery_rows.remove(crowd.session, gallery_rows.gallery_row(crowd.session, GALLERY).id)
    refused = [each.exception(WAIT) for each in outcomes]
    assert [type(each) for each in refused] == [errors.GalleryNotFound] * 3
    assert len(set(map(id, refused))) == 3, "two threads raise one exception"


@pytest.mark.parametrize("each_world", ["postgresql"], indirect=True)
@pytest.mark.parametrize("write", [[items("a"), items("b"), items("c"), items("b", at=7)], [["a"], ["b"], ["c"]]])
def test_where_the_database_does_not_answer_a_commit_is_tried_once_for_all_who_wait(
    each_world: World, pool: ThreadPoolExecutor, write: list[Any]
) -> None:
    tried = 0

    @event.listens_for(each_world.store.catalog.engine, "before_cursor_execute")
    def cut(_: Any, cursor: Any, statement: str, *__: Any) -> None:
        nonlocal tried
        tried += statement.startswith("UPDATE galleries")
        if statement.startswith("UPDATE galleries") and tried > 1:
            with suppress(Exception):  # it does not live to tell
                cursor.connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with Crowd(each_world, pool).gathered(*write) as outcomes:
        pass
    assert outcomes[0].exception(WAIT) is None
    assert {type(each.exception(WAIT)) for each in outcomes[1:]} == {OperationalError}
    assert tried == 2


def test_what_a_request_held_is_free_once_it_is_answered_or_refused(world: World) -> None:
    """And not when garbage is collected: a request may hold as much as a body may."""

    def met() -> list[weakref.ref[Any]]:
        bad, bad_side = {"embeddings": np.full((1, OLD), np.nan)}, {"side": np.full((1, SIDE), np.nan)}
        given = [items("a"), items("b"), items("c", **bad), items("d", **bad_side), items("e"), items("b")]
        with ThreadPoolExecutor(len(given)) as pool, Crowd(world, pool).gathered(*given) as outcomes:
            pass
        assert [each.exception(WAIT) is None for each in outcomes] == [True, True, False, False, True, True]
        alone = items("f", **bad_side)
        with suppress(errors.InvalidVector):
            ingest.upsert(world.store, GALLERY, alone)
        return [weakref.ref(each.embeddings) for each in (*given, alone)]

    gc.collect()
    gc.disable()
    try:
        assert not any(held() is not None for held in met())
    finally:
        gc.enable()


@st.composite
def requests(draw: st.DrawFn) -> Sequence[NewItems]:
    """Small requests, no id in two of them; some cannot be written."""
    made = []
    for request in range(draw(st.integers(1, 5))):
        n = draw(st.integers(0, 3))
        has_side = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), np.bool_)
        vectors = np.array(draw(st.lists(st.integers(-3, 3), min_size=n * OLD, max_size=n * OLD)), np.float32)
        if n and draw(st.integers(0, 9)) == 0:
            vectors[-1] = np.inf
        made.append(
            NewItems(
                "old",
                [f"{request}-{at}" for at in range(n)],
                vectors.reshape(n, OLD),
                draw(st.lists(st.none() | st.just({"a": request}), min_size=n, max_size=n)),
                np.full((int(has_side.sum()), SIDE), request, np.float32) if has_side.any() else None,
                has_side,
            )
        )
    return made


@settings(max_examples=25, deadline=None)
@given(given_requests=requests())
def test_what_is_written_together_is_what_would_be_written_in_turn(prepared: Path, given_requests: Any) -> None:
    told, left = [], []
    for together in (True, False):
        with TemporaryDirectory() as folder:
            world = World.open(shutil.copytree(prepared, Path(folder) / "data"))
            if together:
                outcomes = ingest.upsert_each(world.store, GALLERY, given_requests)
            else:
                outcomes = [each for one in given_requests for each in ingest.upsert_each(world.store, GALLERY, [one])]
            told.append([each.upserted if isinstance(each, Upserted) else repr(each) for each in outcomes])
            left.append(contents(world))
            world.close()
    assert told[0] == told[1]
    assert left[0] == left[1]


@settings(max_examples=25, deadline=None)
@given(asked=st.lists(st.lists(st.sampled_from("abcdx"), max_size=4), min_size=1, max_size=5))
def test_what_is_deleted_together_is_what_would_be_deleted_in_turn(prepared: Path, asked: list[list[str]]) -> None:
    told, left = [], []
    for together in (True, False):
        with TemporaryDirectory() as folder:
            world = World.open(shutil.copytree(prepared, Path(folder) / "data"))
            world.upsert("old", list("abcde"), np.ones((5, OLD)))
            told.append(
                ingest.delete_each(world.store, GALLERY, asked)
                if together
                else [ingest.delete(world.store, GALLERY, ids) for ids in asked]
            )
            left.append(contents(world))
            world.close()
    assert told[0] == told[1]
    assert left[0] == left[1]
