"""Two upgrades on top of each other, in any order of writes and verbs, against a dictionary that knows what must be found.

The oracle knows of each item which transformations made its vector in each model. `test_upgrade_machine.py` does the same for
one upgrade, with crashes, late workers and missing side-information.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import select

from gallery import errors
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ItemRow
from gallery.upgrade import lifecycle, moves
from gallery.upgrade.states import ACTIVE, State, allowed
from tests.gallery.chain import DIMENSIONS, columns, digests, prepared, through
from tests.gallery.crash import named_files, stored_files
from tests.gallery.world import SIDE, World, distance, found

MODELS = list(DIMENSIONS)
#: model -> the upgrade that leads on from it: its transformation and its target
ON = {"old": ("first", "new"), "new": ("second", "newest")}
#: transformation -> where it starts, and where it leads to
ENDS = {"first": ("old", "new"), "second": ("new", "newest"), "direct": ("old", "newest")}
VERBS = {
    "cancel": lifecycle.cancel,
    "rollback": lifecycle.rollback,
    "finalize": lifecycle.finalize,
    "cutover": lifecycle.cutover,
    "pause": lifecycle.pause,
    "resume": lifecycle.resume,
}
QUERIES = {model: np.arange(width, dtype=np.float32)[None] - 2 for model, width in DIMENSIONS.items()}
ids = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True)
Made = dict[str, tuple[str, ...]]


class ChainMachine(RuleBasedStateMachine):
    """One gallery, one operator, one worker."""

    @initialize(direct=st.booleans(), depth=st.integers(0, 2))
    def begin(self, direct: bool, depth: int) -> None:
        """Open a gallery with items, and often with upgrades that are completed."""
        self.folder = Path(tempfile.mkdtemp(prefix="forwardfill-chain-"))
        shutil.copytree(_prepared(direct), self.folder / "data")
        self.world = World.open(self.folder / "data")
        self.known = [name for name in ENDS if direct or name != "direct"]
        #: id -> the model that it came in, its vector and side-information
        self.items: dict[str, tuple[str, Any, Any]] = {}
        #: id -> by model that it has a vector of, what made that
        self.made: dict[str, Made] = {}
        self.model = "old"
        #: open upgrades, each on top of the one before it: id, source, target, and what was stored before it
        self.stack: list[tuple[str, str, str, dict[tuple[int, str], str]]] = []
        self.upsert("old", ["a", "b"], 1)
        for _ in range(depth):
            self.start("progressive")
            self.finish()

    def teardown(self) -> None:
        """Remove everything."""
        if hasattr(self, "world"):
            self.world.close()
            shutil.rmtree(self.folder)

    @rule(model=st.sampled_from(MODELS), wanted=ids, seed=st.integers(0, 99))
    def upsert(self, model: str, wanted: list[str], seed: int) -> None:
        """Write items in any model; those in old have side-information."""
        rng = np.random.default_rng(seed)
        vectors = rng.integers(-9, 10, (len(wanted), DIMENSIONS[model])).astype(np.float32)
        side = rng.integers(-9, 10, (len(wanted), SIDE)).astype(np.float32) if model == "old" else None
        if model not in {self.model, *(end for _, source, target, _ in self.stack for end in (source, target))}:
            with pytest.raises((errors.NoRoute, errors.ModelRetired)):
                self.world.upsert(model, wanted, vectors, side=side)
            return
        self.world.upsert(model, wanted, vectors, side=side)
        for row, item in enumerate(wanted):
            self.items[item] = model, vectors[row], None if side is None else side[row]
            self.made[item] = {model: ()}
        self._moved()

    @rule(wanted=ids)
    def delete(self, wanted: list[str]) -> None:
        """Delete items, some of which are not there."""
        self.world.delete(*wanted)
        for item in wanted:
            self.items.pop(item, None)
            self.made.pop(item, None)

    @rule()
    def compact(self) -> None:
        """A worker merges what is alike."""
        self.world.compact()

    @precondition(lambda self: self.model in ON and not self._active())
    @rule(cutover=st.sampled_from(["progressive", "manual"]))
    def start(self, cutover: str) -> None:
        """Start the upgrade that leads on, unless some item cannot come along."""
        name, target = ON[self.model]
        before = digests(self.world)
        starts = {ENDS[each][0] for each in self.known if ENDS[each][1] == target}
        if any(target not in made and starts.isdisjoint(made) for made in self.made.values()):
            with pytest.raises(errors.WrongTransformation):
                self.world.start(name, cutover=cutover)
            return
        self.stack.append((self.world.start(name, cutover=cutover), self.model, target, before))
        self._moved()

    @precondition(lambda self: self._active())
    @rule()
    def step(self) -> None:
        """A worker does the next step."""
        self.world.step(self.stack[-1][0])
        self._moved()

    @precondition(lambda self: self._active())
    @rule()
    def finish(self) -> None:
        """A worker does all that it can."""
        self.world.run(self.stack[-1][0])
        self._moved()

    @precondition(lambda self: self.stack)
    @rule(verb=st.sampled_from(sorted(VERBS)), below=st.integers(0, 1))
    def ask(self, verb: str, below: int) -> None:
        """Ask something of the topmost upgrade, or of the one under it."""
        at = max(0, len(self.stack) - 1 - below)
        upgrade, *_ = self.stack[at]
        more: dict[str, Any] = {"accept_unreachable": True} if verb in ("cancel", "rollback") else {}
        takes = self._takes(at)
        try:
            changed, told = VERBS[verb](self.world.store, upgrade, **more).changed, takes  # type: ignore[operator]
        except errors.InvalidStateTransition as refused:
            changed, told = False, refused.details["allowed"]
        assert (changed, told) == (verb in takes, takes)
        if changed and verb in ("cancel", "rollback"):
            self._undone()
        elif changed and verb == "finalize":
            self._finalized(at)
        self._moved()

    # what must hold after each of these

    @invariant()
    def every_vector_came_about_by_the_fewest_transformations(self) -> None:
        """And none is there, or gone, that should not be."""
        stored = columns(self.world)
        targets = {target for _, _, target, _ in self.stack}
        with self.world.store.catalog.reading() as session:
            places = select(ItemRow.item_id, ItemRow.segment_id).where(ItemRow.deleted_version.is_(None))
            live = dict(session.execute(places).all())
        assert live.keys() == self.items.keys()
        for item, segment in live.items():
            made = self.made[item]
            for model in [each for each in MODELS if each in stored[segment] and each not in made]:
                assert model in targets
                made[model] = min(self._ways(made, model, longest=1), key=len)
            assert stored[segment] == made

    @invariant()
    def all_items_of_a_completed_upgrade_have_its_vectors(self) -> None:
        """But those that came in a model that is newer still."""
        for upgrade, _, target, _ in self.stack:
            if self.world.state(upgrade) is State.COMPLETED:
                newer = MODELS[MODELS.index(target) + 1 :]
                assert all(target in made or self.items[item][0] in newer for item, made in self.made.items())

    @invariant()
    def every_live_item_is_found_exactly_once_with_its_score(self) -> None:
        """By a query of any model that knows itself in the others."""
        seen = self.world.galleries.refresh()
        for model in MODELS:
            companions = {name: query for name, query in QUERIES.items() if name != model}
            spaces = [model, *sorted(companions)]
            vectors = (self._vectors(space) for space in spaces)
            space, expected = next(found for found in zip(spaces, vectors, strict=True) if found[1] is not None)
            answer = self.world.search(model, QUERIES[model], companions=companions, seen=seen)
            assert answer.score_space == space
            assert found(answer) == {item: distance(QUERIES[space][0], vector) for item, vector in expected.items()}

    @invariant()
    def each_upgrade_takes_what_those_on_top_of_it_allow(self) -> None:
        """As its document says."""
        with self.world.store.catalog.reading() as session:
            for at, (upgrade, *_) in enumerate(self.stack):
                row = upgrade_rows.upgrade_row(session, upgrade)
                assert moves.takes(row, upgrade_rows.stack_of(session, row)) == self._takes(at)

    @invariant()
    def files_are_those_that_the_catalog_names(self) -> None:
        """Nothing is lost, nothing lies about."""
        assert stored_files(self.folder / "data") == named_files(self.world)

    # the oracle

    def _ways(self, made: Made, model: str, longest: int) -> list[tuple[str, ...]]:
        """How vectors of a model come about from those that an item has."""
        if longest == 0:
            return []
        found = []
        for name in self.known:
            source, target = ENDS[name]
            if target == model:
                found += [(*made[source], name)] if source in made else []
                found += [(*way, name) for way in self._ways(made, source, longest - 1)]
        return found

    def _vectors(self, space: str) -> dict[str, Any] | None:
        """Every item's vector in a space; None if one has none there."""
        found = {}
        for item, made in self.made.items():
            ways = [made[space]] if space in made else self._ways(made, space, longest=2)
            if not ways:
                return None
            found[item] = through(min(ways, key=len), *self.items[item][1:])
        return found

    def _takes(self, at: int) -> list[str]:
        above = [self.world.state(upgrade) for upgrade, *_ in self.stack[at + 1 :]]
        hidden = ["rollback"] * bool(above) + ["finalize"] * any(state in ACTIVE for state in above)
        return [verb for verb in allowed(self.world.state(self.stack[at][0])) if verb not in hidden]

    def _active(self) -> bool:
        return bool(self.stack) and self.world.state(self.stack[-1][0]) in ACTIVE

    def _moved(self) -> None:
        self.every_vector_came_about_by_the_fewest_transformations()  # before the next rule counts on it
        if self.stack and self.world.state(self.stack[-1][0]) is State.COMPLETED:
            self.model = self.stack[-1][2]

    def _undone(self) -> None:
        """What was stored before has its bytes, but for what an older upgrade's end or a merge took since."""
        _, self.model, target, before = self.stack.pop()
        after = digests(self.world)
        assert all(before[key] == after[key] for key in before.keys() & after.keys())
        there = {segment for segment, _ in after}
        gone = {model for segment, model in before.keys() - after.keys() if segment in there}
        assert gone <= ({"old"} if target == "newest" and not self.stack else set())
        for made in self.made.values():
            if made.get(target):
                del made[target]

    def _finalized(self, at: int) -> None:
        """Of these models an item keeps the newest."""
        ended, self.stack = self.stack[: at + 1], self.stack[at + 1 :]
        for n, (_, source, _, _) in enumerate(ended):
            newer = {target for _, _, target, _ in ended[n:]}
            for made in self.made.values():
                if not newer.isdisjoint(made):
                    made.pop(source, None)


@cache
def _prepared(direct: bool) -> Path:
    """A data folder to copy: a migration takes longer than all the rest of an example."""
    folder = _FOLDER / f"{direct}"
    prepared(folder, direct=direct).close()
    return folder


_FOLDER = Path(tempfile.mkdtemp(prefix="forwardfill-chains-"))


@pytest.fixture(autouse=True, scope="module")
def _folder() -> Iterator[None]:
    yield
    shutil.rmtree(_FOLDER)


ChainMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("FORWARDFILL_MACHINE_EXAMPLES", "4")),
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestChainMachine = ChainMachine.TestCase
