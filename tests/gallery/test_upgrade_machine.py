"""Anything, in any order: writes, upgrades, crashes and late workers against a dictionary that knows what must be found.

`tests/gallery/upgrade_oracle.py` says what must be found.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import func, select, update

from gallery import errors, removal
from gallery.catalog import items as item_rows
from gallery.catalog.tables import ColumnRow, ItemRow, UpgradeSegmentRow
from gallery.compact.merge import reclaim
from gallery.files import digest
from gallery.indexing import index_column, wanting
from gallery.search.request import Answer
from gallery.upgrade import lifecycle, segment
from gallery.upgrade.states import DRIVEN, PUBLISHING, State, Verb, wants
from tests.gallery.crash import Bomb, Killed, Stage, leases_run_out, named_files, stored_files, sweep
from tests.gallery.upgrade_oracle import Expected, Oracle, Variant, been
from tests.gallery.world import BACKWARD, GALLERY, NEW, OLD, PLAIN, SIDE, WITH_SIDE, World, found, work

DIMENSIONS = {"old": OLD, "new": NEW}
IDS = ["a", "b", "c", "ä/ö", "日本", "f g", "🙂"]
# One list holds every row, so that an IVF index is exact; `exact_below=0` gives even one row an index.
INDEXED = {"kind": "ivf", "nlist": 1, "nprobe": 1}
VERBS: dict[Verb, Callable[..., Any]] = {
    Verb.PAUSE: lifecycle.pause,
    Verb.RESUME: lifecycle.resume,
    Verb.RETRY: lifecycle.retry,
    Verb.CUTOVER: lifecycle.cutover,
    Verb.FINALIZE: lifecycle.finalize,
    Verb.CANCEL: lifecycle.cancel,
    Verb.ROLLBACK: lifecycle.rollback,
}
ids = st.lists(st.sampled_from(IDS), min_size=1, max_size=4, unique=True)
seeds = st.integers(0, 2**16)
NOW = st.integers(0, 40)
CUTOVERS = st.sampled_from(["progressive", "manual", "automatic"])
POLICIES = st.sampled_from(["fail", "zeros", "skip"])


class UpgradeMachine(Oracle, RuleBasedStateMachine):
    """One gallery, two API processes, any number of workers, one operator who does anything."""

    @initialize(
        needs_side=st.booleans(),
        backward=st.booleans(),
        indexed=st.sampled_from([False, False, True]),
        at=st.sampled_from(["empty", "running", "ran"]),
        cutover=CUTOVERS,
        policy=POLICIES,
    )
    def begin(self, needs_side: bool, backward: bool, indexed: bool, at: str, cutover: str, policy: str) -> None:
        """Open a data folder that is prepared; often with items, and an upgrade that runs or ran."""
        self.variant = Variant(needs_side, backward, indexed)
        self.linear = WITH_SIDE if needs_side else PLAIN
        self.stage = _stage()
        self.stage.set(_prepared(self.variant))
        self.folder = self.stage.folder
        self.settings = {"exact_below": 0 if indexed else 20_000}
        self.world = self.stage.open(**self.settings)
        self.other = self.stage.open("other", **self.settings)
        self.seen = self.other.galleries.refresh()
        self.stale: list[Any] = []
        self._made()
        if at != "empty":
            for seed, wanted in enumerate((IDS[:3], IDS[2:5], IDS[4:])):
                self.upsert("old", wanted, seed, "a")
            self.start(cutover, policy)
            self.advance()
        if at == "ran":
            self.finish_the_upgrade()

    # writes

    @rule(model=st.sampled_from(["old", "old", "new"]), wanted=ids, seed=seeds, sides=st.sampled_from("anx"))
    def upsert(self, model: str, wanted: list[str], seed: int, sides: str) -> None:
        """Write items, all (a), none (n), or some (x) of them with side-information."""
        given = _items(model, wanted, seed, sides)
        refusal = self._refusal(model, given)
        if refusal is not None:
            with pytest.raises(refusal):
                self.world.upsert(model, wanted, **given)
            return
        self.world.upsert(model, wanted, **given)
        self._upserted(model, wanted, given)

    @rule(wanted=ids)
    def delete(self, wanted: list[str]) -> None:
        """Delete items, some of which are not there."""
        result = self.world.delete(*wanted)
        assert (result.deleted, result.missing) == (
            sum(item in self.items for item in wanted),
            [item for item in wanted if item not in self.items],
        )
        for item in wanted:
            self.items.pop(item, None)

    @precondition(lambda self: self.variant.indexed)
    @rule()
    def index(self) -> None:
        """A worker builds an index that is wanting."""
        for column in wanting(self.world.store, limit=1):
            assert index_column(self.world.store, column)

    @rule(segments=st.integers(2, 3), everything=st.booleans())
    def compact(self, segments: int, everything: bool) -> None:
        """A worker merges segments; nothing else changes."""
        before = self._segments_there()
        self.world.compact(segments=segments, rows=6, everything=everything)
        self._compacted(before)

    @rule()
    def reclaim(self) -> None:
        """A worker removes what merges left behind; the other process may still search it."""
        reclaim(self.world.store, -1)
        self._compacted(self._segments_there())

    # the operator

    @rule(cutover=CUTOVERS, policy=POLICIES)
    def start(self, cutover: str, policy: str) -> None:
        """Start an upgrade, possibly where none can start."""
        request = {"cutover": cutover, "on_missing_side_information": policy}
        refusal = (
            errors.SameModel if self.model == "new" else errors.UpgradeInProgress if self._open_upgrade() else None
        )
        if refusal is not None:
            with pytest.raises(refusal):
                self.world.start(**request)
            return
        self.before = _digests(self.world)
        self.upgrade = self.world.start(**request)
        self.cutover, self.policy, self.done, self.held = cutover, policy, set(), []
        self._worked()

    @precondition(lambda self: self.upgrade is not None)
    @rule(verb=st.sampled_from(sorted(Verb)), accept=st.booleans())
    def ask(self, verb: Verb, accept: bool) -> None:
        """Ask for anything at any time."""
        state = self._state()
        more = {"accept_unreachable": accept} if verb in (Verb.CANCEL, Verb.ROLLBACK) else {}
        try:
            changes = wants(verb, state)
        except errors.InvalidStateTransition:
            with pytest.raises(errors.InvalidStateTransition):
                VERBS[verb](self.world.store, self.upgrade, **more)
            return
        if changes and more and not accept and self._only_new():
            with pytest.raises(errors.NativeItemsWouldBeUnreachable):
                VERBS[verb](self.world.store, self.upgrade, **more)
            return
        result = VERBS[verb](self.world.store, self.upgrade, **more)
        assert result.changed == changes or verb is Verb.RETRY
        if changes:
            self._asked(verb)
        self._worked()

    @precondition(lambda self: len(self.segments) > 5)
    @rule()
    def delete_gallery(self) -> None:
        """Delete the gallery and make it again under the same name."""
        removal.delete_gallery(self.world.store, GALLERY)
        self.world.make(GALLERY, index=INDEXED if self.variant.indexed else None)
        self._made()

    # workers

    @precondition(lambda self: self.upgrade is not None and self._state() in DRIVEN)
    @rule()
    def advance(self) -> None:
        """A worker does the next step."""
        state, doomed = self._state(), self._lacks_side()
        self.world.step(self.upgrade or "")
        self._worked()
        if state in (State.PENDING, State.VALIDATING):
            assert self._state() == (State.FAILED if doomed else State.RUNNING), self.world.error(self.upgrade or "")
        if state is State.VERIFYING:
            assert self._state() == (State.AWAITING_CUTOVER if self.cutover == "manual" else State.COMPLETED)

    @precondition(lambda self: self.upgrade is not None and self._state() in DRIVEN)
    @rule()
    def finish_the_upgrade(self) -> None:
        """Workers do all that they can."""
        while self.world.step(self.upgrade or ""):
            self._worked()
        self._worked()

    @precondition(lambda self: self.upgrade is not None and self._state() is State.RUNNING)
    @rule(owner=st.sampled_from(["first", "second"]))
    def lease(self, owner: str) -> None:
        """A worker takes a segment and then takes its time."""
        held = segment.lease(self.world.store, self.upgrade or "", owner)
        if held is not None:
            self.held.append(held)

    @precondition(lambda self: self.held)
    @rule(which=NOW)
    def finish(self, which: int) -> None:
        """A worker that took its time wakes up and does its segment."""
        held = self.held.pop(which % len(self.held))
        row = self._work(held.segment_id)
        holds = row is not None and (row.state, row.fence) == ("leased", held.fence)
        before = set(self.done)
        if holds and self._state() in PUBLISHING:
            try:
                work(self.world.store, held)
            except errors.MissingSideInformation:
                segment.fail(self.world.store, held, "no side-information")
                assert self.policy == "fail"
            self._worked()
            assert self.done - before <= {held.segment_id}
            return
        with pytest.raises(errors.LeaseLost):
            work(self.world.store, held)
        been.add("lease_lost")
        self._worked()
        assert self.done == before

    @precondition(lambda self: self.held)
    @rule(which=NOW, forget=st.booleans())
    def let_a_lease_expire(self, which: int, forget: bool) -> None:
        """A worker is silent for too long; it may be dead, or wake up later."""
        held = self.held[which % len(self.held)]
        if forget:
            self.held.remove(held)
        self._expire(held.segment_id)

    @precondition(lambda self: self.upgrade is not None and self._state() is State.RUNNING)
    @rule(late_first=st.booleans())
    def overtake(self, late_first: bool) -> None:
        """A segment is taken over from a worker that was frozen, which then thaws."""
        before = len(self.held)
        self.lease("frozen")
        if len(self.held) == before:
            return
        self._expire(self.held[-1].segment_id)
        self.lease("second")
        for _ in self.held[before:]:
            self.finish(before if late_first else len(self.held) - 1)

    # crashes

    @rule(
        model=st.sampled_from(["old", "new"]),
        wanted=ids,
        seed=seeds,
        sides=st.sampled_from("anx"),
        at=NOW,
        unwinds=st.booleans(),
    )
    def crash_in_an_upsert(self, model: str, wanted: list[str], seed: int, sides: str, at: int, unwinds: bool) -> None:
        """The process that writes dies; the commit decides whether the items are there."""
        given = _items(model, wanted, seed, sides)
        if self._refusal(model, given) is not None:
            return
        with self._dying(at, unwinds) as (bomb, world):
            world.upsert(model, wanted, **given)
        if bomb.commits:
            self._upserted(model, wanted, given)

    @rule(wanted=ids, at=NOW)
    def crash_in_a_delete(self, wanted: list[str], at: int) -> None:
        """Likewise."""
        with self._dying(at % 3) as (bomb, world):
            world.delete(*wanted)
        if bomb.commits:
            for item in wanted:
                self.items.pop(item, None)

    @precondition(lambda self: self.upgrade is not None and self._state() in DRIVEN)
    @rule(at=NOW, unwinds=st.booleans())
    def crash_in_a_step(self, at: int, unwinds: bool) -> None:
        """A worker dies; what it leased is taken over later."""
        with self._dying(at % 12, unwinds) as (_, world):
            world.step(self.upgrade or "", "mortal")
        leases_run_out(self.world.store.catalog)
        self._worked()

    @precondition(lambda self: self.upgrade is not None)
    @rule(verb=st.sampled_from([Verb.CANCEL, Verb.ROLLBACK, Verb.FINALIZE]), at=NOW)
    def crash_in_a_verb(self, verb: Verb, at: int) -> None:
        """The process that was asked dies."""
        try:
            changes = wants(verb, self._state())
        except errors.InvalidStateTransition:
            return
        more = {} if verb is Verb.FINALIZE else {"accept_unreachable": True}
        with self._dying(at % 6) as (bomb, world):
            VERBS[verb](world.store, self.upgrade, **more)
        if bomb.commits and changes:
            self._asked(verb)
        self._worked()

    @rule(at=NOW, unwinds=st.booleans())
    def crash_in_a_compaction(self, at: int, unwinds: bool) -> None:
        """A worker dies while it merges or reclaims."""
        before = self._segments_there()
        with self._dying(at % 20, unwinds) as (_, world):
            world.compact(rows=6)
            reclaim(world.store, -1)
        self._compacted(before)

    # the other API process

    @rule()
    def refresh(self) -> None:
        """The other process looks at the catalog, and then answers from what it saw."""
        self.seen = self.other.galleries.refresh()
        self.stale = [*self._answers(self.other, self.seen)]
        assert self.stale == [*self._answers(self.world, self.world.galleries.refresh())]

    # what must hold after each of these

    @invariant()
    def every_live_item_is_found_exactly_once_with_its_score(self) -> None:
        """In either model, with and without companions."""
        seen = self.world.galleries.refresh()
        for model, given in _queries():
            expected = self._expected(model, given)
            try:
                answer = self._search(self.world, seen, model, given)
            except errors.Conflict as error:
                refused = type(error)
                assert refused is expected, (model, sorted(given))
                been.add(error.code)
                continue
            assert isinstance(expected, Expected), (model, sorted(given), expected)
            self._check(answer, expected)
            been.update(route for route, items in expected.routes.items() if items)

    @invariant()
    def the_other_process_answers_as_of_its_refresh(self) -> None:
        """A snapshot never changes, whatever is deleted meanwhile."""
        if self.stale:
            assert [*self._answers(self.other, self.seen)] == self.stale

    @invariant()
    def no_id_is_live_twice(self) -> None:
        """In the database, by a count over its rows."""
        with self.world.store.catalog.reading() as session:
            live = select(ItemRow.item_id, func.count()).where(ItemRow.deleted_version.is_(None))
            counted = dict(session.execute(live.group_by(ItemRow.item_id)).all())
        assert counted == dict.fromkeys(self.items, 1)

    @invariant()
    def files_are_those_that_the_catalog_names(self) -> None:
        """Nothing is lost, nothing lies about; orphans of crashes are swept in the rule that made them."""
        assert stored_files(self.folder) == named_files(self.world)

    @invariant()
    def what_was_there_before_the_upgrade_has_its_bytes(self) -> None:
        """Until it is finalized, and after it was undone."""
        if self.upgrade is not None and self._state() is not State.FINALIZED:
            assert self.before.items() <= _digests(self.world).items()

    # looking and doing

    def _work(self, segment_id: int) -> UpgradeSegmentRow | None:
        with self.world.store.catalog.reading() as session:
            return session.get(UpgradeSegmentRow, (self.upgrade, segment_id))

    def _expire(self, segment_id: int) -> None:
        with self.world.store.catalog.transaction() as tx:
            tx.session.execute(
                update(UpgradeSegmentRow)
                .where(UpgradeSegmentRow.segment_id == segment_id, UpgradeSegmentRow.state == "leased")
                .values(leased_until=datetime(2000, 1, 1, tzinfo=UTC))
            )

    @contextmanager
    def _dying(self, at: int, unwinds: bool = False) -> Iterator[tuple[Bomb, World]]:
        """A process that may die, then its restart, which sweeps."""
        bomb = Bomb(at, unwinds=unwinds)
        try:
            yield bomb, self.stage.mortal(bomb, **self.settings)
        except Killed:
            assert bomb.went_off
        self.world = self.stage.open(**self.settings)
        orphans = stored_files(self.folder) - named_files(self.world)
        assert sweep(self.world) == orphans

    def _search(self, world: World, seen: Any, model: str, given: dict[str, Any]) -> Answer:
        others = {name: vector for name, vector in given.items() if name != model}
        return world.search(model, given[model], companions=others, seen=seen)

    def _answers(self, world: World, seen: Any) -> Iterator[Any]:
        for model, given in _queries():
            try:
                answer = self._search(world, seen, model, given)
            except errors.Conflict as error:
                yield error.code
            else:
                yield answer.snapshot.version, answer.score_space, answer.coverage, answer.hits(0)

    def _check(self, answer: Answer, expected: Expected) -> None:
        assert answer.score_space == expected.space
        assert found(answer) == expected.scores
        assert answer.coverage._asdict() == {**expected.routes, "unreachable": 0}
        assert answer.snapshot.live == len(self.items)
        hits = answer.hits(0)
        assert {hit.id: hit.origin for hit in hits} == expected.origins
        with self.world.store.catalog.reading() as session:
            payloads = item_rows.payloads(session, [hit.place for hit in hits])
        assert {hit.id: payloads[hit.place] for hit in hits} == {i: row.payload for i, row in self.items.items()}


def _items(model: str, wanted: list[str], seed: int, sides: str) -> dict[str, Any]:
    """Random vectors, side-information and payloads that can be told apart."""
    rng = np.random.default_rng(seed)
    n = len(wanted)
    has_side = np.full(n, sides == "a") if sides != "x" else rng.random(n) < 0.5
    if model == "new":
        has_side[:] = False  # its registration has none
    side = rng.integers(-9, 10, (int(has_side.sum()), SIDE)).astype(np.float32) if has_side.any() else None
    return {
        "vectors": rng.integers(-20, 21, (n, DIMENSIONS[model])).astype(np.float32),
        "side": side,
        "has_side": has_side,
        "payloads": [{"seed": seed, "of": item} for item in wanted],
    }


def _queries() -> list[tuple[str, dict[str, Any]]]:
    old, new = np.array([[3, -1, 4, 1]], np.float32), np.array([[2, 7, -1, 8, 2]], np.float32)
    return [
        ("old", {"old": old}),
        ("old", {"old": old, "new": new}),
        ("new", {"new": new}),
        ("new", {"new": new, "old": old}),
    ]


def _digests(world: World) -> dict[str, str]:
    """The digest of every file of a source column, as it lies on the disk."""
    with world.store.catalog.reading() as session:
        files = session.scalars(select(ColumnRow.file).where(ColumnRow.origin == "native"))
        return {file: digest(world.store.files.path(file)) for file in files}


@cache
def _stage() -> Stage:
    return Stage(_FOLDER)


@cache
def _prepared(variant: Variant) -> Path:
    """A data folder to copy: a migration takes longer than all the rest of an example."""
    folder = _FOLDER / f"{variant.needs_side}-{variant.backward}-{variant.indexed}"
    transformations = [("forward", "old", "new", WITH_SIDE if variant.needs_side else PLAIN)]
    if variant.backward:
        transformations.append(("backward", "new", "old", BACKWARD))
    World.open(folder).prepare(*transformations, index=INDEXED if variant.indexed else None).close()
    return folder


_FOLDER = Path(tempfile.mkdtemp(prefix="forwardfill-machine-"))


@pytest.fixture(autouse=True, scope="module")
def _folder() -> Iterator[None]:
    yield
    _stage().close()
    shutil.rmtree(_FOLDER)


UpgradeMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("FORWARDFILL_MACHINE_EXAMPLES", "20")),
    stateful_step_count=30,
    suppress_health_check=list(HealthCheck),
)
TestUpgradeMachine = UpgradeMachine.TestCase


def test_a_tour_sees_every_state_and_every_route() -> None:
    """What the machine tries in any order, once on a known way; so that it cannot turn hollow unseen.

    States that are passed within one transaction are never seen.
    """
    been.clear()
    for backward, at, cutover, policy in (
        (False, "running", "progressive", "fail"),
        (False, "ran", "progressive", "zeros"),
        (False, "ran", "manual", "skip"),
        (True, "running", "automatic", "zeros"),
    ):
        tour = UpgradeMachine()
        tour.begin(needs_side=True, backward=backward, indexed=False, at=at, cutover=cutover, policy=policy)
        for step in (
            partial(tour.upsert, "new", ["a", "b"], 7, "n"),
            partial(tour.upsert, "old", ["c", "a"], 8, "x"),
            partial(tour.ask, Verb.PAUSE, accept=False),
            tour.refresh,
            partial(tour.ask, Verb.RESUME, accept=False),
            partial(tour.overtake, late_first=True),
            partial(tour.overtake, late_first=False),
            partial(tour.delete, ["a", "b"]),
            partial(tour.compact, 2, everything=True),
            tour.finish_the_upgrade,
            partial(tour.compact, 2, everything=True),
            partial(tour.ask, Verb.CUTOVER, accept=False),
            partial(tour.ask, Verb.ROLLBACK, accept=cutover == "manual"),
            partial(tour.upsert, "old", ["d", "e"], 9, "n"),
            partial(tour.compact, 2, everything=True),
            tour.reclaim,
            partial(tour.ask, Verb.FINALIZE, accept=False),
            partial(tour.start, "progressive", "fail"),
            tour.finish_the_upgrade,
            partial(tour.ask, Verb.CANCEL, accept=True),
            partial(tour.start, "progressive", "zeros"),
            tour.finish_the_upgrade,
            partial(tour.ask, Verb.FINALIZE, accept=True),
            partial(tour.upsert, "old", ["a"], 10, "a"),
            tour.delete_gallery,
            partial(tour.upsert, "old", ["a"], 11, "a"),
        ):
            step()
            tour.every_live_item_is_found_exactly_once_with_its_score()
            tour.the_other_process_answers_as_of_its_refresh()
            tour.no_id_is_live_twice()
            tour.files_are_those_that_the_catalog_names()
            tour.what_was_there_before_the_upgrade_has_its_bytes()
    states = {state.value for state in State} - {State.VALIDATING, State.CANCELLING, State.ROLLING_BACK}
    seen = states | {"direct", "forward", "backward", "no_route", "model_retired", "lease_lost", "compacted"}
    assert seen <= been, seen - been
