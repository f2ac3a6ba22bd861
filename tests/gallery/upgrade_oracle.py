"""What must be found while a gallery is upgraded: the rules of searches and upgrades, written once more for tests.

The oracle knows of each item which segment it came in, and of each segment which columns a search may use; everything else
(which space, which items, which scores) follows from that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select

from gallery import errors
from gallery.catalog.tables import ColumnRow, ItemRow, SegmentRow, UpgradeSegmentRow
from gallery.catalog.upgrades import Lease, upgrade_row
from gallery.upgrade.states import ACTIVE, TRANSFORMED, State, Verb
from tests.gallery.world import BACKWARD, SIDE, Linear, World, distance

#: states, routes and refusals that were seen
been: set[str] = set()


@dataclass
class Segment:
    """What the oracle knows of a segment."""

    model: str
    has_side: bool
    #: columns that a search may use: model -> native or derived
    columns: dict[str, str]
    #: a derived column of the present upgrade waits for its cutover
    waits: bool = False


@dataclass
class Item:
    """What was last acknowledged for an id."""

    segment: int
    vector: NDArray[Any]
    side: NDArray[Any] | None
    payload: dict[str, Any]


@dataclass
class Expected:
    """What a search must answer."""

    space: str
    scores: dict[str, float]
    origins: dict[str, str]
    routes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """What a gallery has at hand."""

    needs_side: bool
    backward: bool
    indexed: bool


class Oracle:
    """Follows what is acknowledged, and says what a search must answer. It looks at the catalog only for what workers did."""

    world: World
    variant: Variant
    linear: Linear

    def _made(self) -> None:
        self.items: dict[str, Item] = {}
        self.ever: set[str] = set()
        self.segments: dict[int, Segment] = {}
        self.model = "old"
        self.upgrade: str | None = None
        self.policy = self.cutover = ""
        self.finalized = False
        self.zeros: set[str] = set()
        self.done: set[int] = set()
        self.held: list[Lease] = []
        self.before: dict[str, str] = {}

    def _expected(self, model: str, given: dict[str, Any]) -> Expected | type[errors.GalleryError]:
        known = dict(given)
        if self.variant.backward and model == "new":
            known.setdefault("old", BACKWARD(given["new"]))
        spaces = [model, *sorted(known.keys() - {model})]
        if model == "old" and self.finalized and not self.items:
            to_come = Segment("new", False, {"new": "native"})
            if not any(self._route(to_come, space, known) for space in spaces):
                return errors.ModelRetired
        for space in spaces:
            routes = {item: self._route(self.segments[row.segment], space, known) for item, row in self.items.items()}
            if None not in routes.values():
                counted = {route: list(routes.values()).count(route) for route in ("direct", "forward", "backward")}
                return Expected(
                    space=space,
                    scores={i: distance(known[space][0], self._vector(i, space)) for i in self.items},
                    origins={i: self._origin(i, space, route) for i, route in routes.items()},
                    routes=counted,
                )
        return errors.ModelRetired if model == "old" and self.finalized else errors.NoRoute

    def _route(self, at: Segment, space: str, known: dict[str, Any]) -> str | None:
        if space in at.columns:
            return "direct"
        if space == "new":
            fed = not self.variant.needs_side or at.has_side or bool(self.zeros)
            return "forward" if fed and "old" in at.columns and "old" in known else None
        return "backward" if self.variant.backward else None

    def _origin(self, item: str, space: str, route: str | None) -> str:
        return self.segments[self.items[item].segment].columns[space] if route == "direct" else "derived"

    def _vector(self, item: str, space: str) -> NDArray[Any]:
        row = self.items[item]
        at = self.segments[row.segment]
        side = row.side if row.side is not None else np.zeros(SIDE)
        if space == at.model and space in at.columns:
            return row.vector
        new = row.vector if at.model == "new" else self.linear(row.vector[None], side[None])[0]
        return new if space == "new" else BACKWARD(new[None])[0]

    def _refusal(self, model: str, given: dict[str, Any]) -> type[errors.GalleryError] | None:
        open_ = self._open_upgrade()
        if open_ and model == "old":
            refused = self._state() is State.FAILED and not self._began()
            strict = self.variant.needs_side and self.policy == "fail" and not refused
            return errors.MissingSideInformation if strict and not given["has_side"].all() else None
        if model == self.model or (model == "new" and (open_ or self.variant.backward)):
            return None
        return errors.ModelRetired if model == "old" and self.finalized else errors.NoRoute

    def _upserted(self, model: str, wanted: list[str], given: dict[str, Any]) -> None:
        state = self._state() if self._open_upgrade() else None
        with self.world.store.catalog.reading() as session:
            last = max(self.segments, default=0)
            new = list(session.scalars(select(SegmentRow.id).where(SegmentRow.id > last).order_by(SegmentRow.id)))
        has_side = given["has_side"]
        kinds = [kind for kind in (True, False) if (has_side == kind).any()]
        sides = iter(given["side"] if given["side"] is not None else ())
        for segment_id, kind in zip(new, kinds, strict=True):
            at = self.segments[segment_id] = Segment(model, kind, {model: "native"})
            if (
                state in TRANSFORMED
                and model == "old"
                and (kind or not self.variant.needs_side or self.policy != "skip")
            ):
                at.waits = True
                if state is State.COMPLETED or self.cutover == "progressive":
                    self._show(at)
        by_kind = dict(zip(kinds, new, strict=True))
        for row, item in enumerate(wanted):
            self.items[item] = Item(
                segment=by_kind[bool(has_side[row])],
                vector=given["vectors"][row],
                side=next(sides) if has_side[row] else None,
                payload=given["payloads"][row],
            )

    def _worked(self) -> None:
        """Follow what the workers' rows say was done."""
        with self.world.store.catalog.reading() as session:
            rows = session.scalars(
                select(UpgradeSegmentRow.segment_id).where(
                    UpgradeSegmentRow.upgrade_id == self.upgrade, UpgradeSegmentRow.state == "done"
                )
            )
            done = set(rows)
        assert self.done <= done
        state = self._state()
        if self.policy == "zeros" and self._began() and state not in (State.CANCELLED, State.ROLLED_BACK):
            self.zeros.add(self.upgrade or "")
        for segment_id in done - self.done:
            self.segments[segment_id].waits = True
        self.done = done
        if (state in ACTIVE and self.cutover == "progressive") or state is State.COMPLETED:
            for at in self.segments.values():
                self._show(at)
        if state is State.COMPLETED:
            self.model = "new"

    def _segments_there(self) -> set[int]:
        with self.world.store.catalog.reading() as session:
            return set(session.scalars(select(SegmentRow.id).where(SegmentRow.retired_at.is_(None))))

    def _compacted(self, before: set[int]) -> None:
        """Items are in new segments, which are like those that they were in; an active upgrade's are as they were."""
        after = self._segments_there()
        with self.world.store.catalog.reading() as session:
            live = select(ItemRow.item_id, ItemRow.segment_id).where(ItemRow.deleted_version.is_(None))
            places = dict(session.execute(live).all())
            done = select(UpgradeSegmentRow.segment_id).where(
                UpgradeSegmentRow.upgrade_id == self.upgrade, UpgradeSegmentRow.state == "done"
            )
            kept = select(ColumnRow.file).join(SegmentRow).where(SegmentRow.retired_at.is_(None))
            named, self_done = set(session.scalars(kept)), set(session.scalars(done))
        if self.upgrade is not None and self._state() in ACTIVE:
            assert self.done == self_done
            assert not self.done & (before - after)
        self.done = self_done
        for item, row in self.items.items():
            old, new = row.segment, places[item]
            if old != new:
                assert old in before - after
                assert new in after - before
                assert self.segments.setdefault(new, self.segments[old]) == self.segments[old]
                row.segment = new
                been.add("compacted")
        for segment_id in after - before:  # its items may have been deleted since
            assert segment_id in self.segments
        self.before = {file: sha256 for file, sha256 in self.before.items() if file in named}

    def _show(self, at: Segment) -> None:
        if at.waits:
            at.columns["new"], at.waits = "derived", False

    def _asked(self, verb: Verb) -> None:
        if verb in (Verb.CANCEL, Verb.ROLLBACK):
            self.model = "old"
            self.zeros.discard(self.upgrade or "")
            for at in self.segments.values():
                at.waits = False
                if at.columns.get("new") == "derived":
                    del at.columns["new"]
        if verb is Verb.FINALIZE:
            self.finalized = True
            for at in self.segments.values():
                if "new" in at.columns:
                    at.columns.pop("old", None)

    def _only_new(self) -> bool:
        return any(self.segments[item.segment].columns == {"new": "native"} for item in self.items.values())

    def _lacks_side(self) -> bool:
        lacking = (self.segments[item.segment] for item in self.items.values())
        return (
            self.variant.needs_side
            and self.policy == "fail"
            and any(not at.has_side and "new" not in at.columns for at in lacking)
        )

    def _state(self) -> State:
        state = self.world.state(self.upgrade or "")
        been.add(state)
        return state

    def _began(self) -> bool:
        """Whether the upgrade was found fit to run."""
        with self.world.store.catalog.reading() as session:
            return upgrade_row(session, self.upgrade or "").started_at is not None

    def _open_upgrade(self) -> bool:
        return self.upgrade is not None and (self._state() in ACTIVE or self._state() is State.COMPLETED)
