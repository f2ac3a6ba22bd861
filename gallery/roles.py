"""Whether a gallery takes items of a model, and what its open upgrades want of them. Pure.

Upgrades that are not finalized lie on top of each other: v1 -> v2 is completed, v2 -> v3 runs. An item that comes in v1 gets
its column of v2 with the request, since every other segment has one, and waits for v3 with all the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gallery import errors
from gallery.catalog.tables import GalleryRow, UpgradeRow
from gallery.spaces import EmbeddingModel, Registry, Transformation
from gallery.upgrade.sources import choose
from gallery.upgrade.states import TRANSFORMED, WORKING, State


class Derive(NamedTuple):
    """An upgrade that has made its column of every segment, so a new segment comes with one too."""

    upgrade: str
    #: whether the column is seen at once, or waits for the cutover
    published: bool


class Role(NamedTuple):
    """What a gallery's upgrades want of items that come in a model."""

    #: in the order in which the upgrades lie on top of each other
    derive: tuple[Derive, ...] = ()
    #: the id of the upgrade that transforms the new segment later
    queue: str | None = None


#: what each open upgrade is pinned to, by its id
Pinned = Mapping[str, Sequence[Transformation]]


def is_of(gallery: GalleryRow, model: EmbeddingModel, stack: Sequence[UpgradeRow]) -> bool:
    """Whether a model is the gallery's, or one of those that its open upgrades lead from or to."""
    return model.name in {gallery.model.name, *(name for u in stack for name in (u.source.name, u.target.name))}


def role(model: EmbeddingModel, stack: Sequence[UpgradeRow], pinned: Pinned) -> Role:
    """What to do with items of a model that is the gallery's, or of its open upgrades.

    Args:
        model: what embedded them.
        stack: the open upgrades of the gallery where they shall go, each on top of the one before it.
        pinned: their transformations.
    """
    reached, derive, queue = {model.name}, [], None
    for upgrade in stack:
        if upgrade.target.name in reached or reached.isdisjoint(each.source for each in pinned[upgrade.id]):
            continue
        reached.add(upgrade.target.name)
        if upgrade.state in TRANSFORMED:
            derive.append(
                Derive(upgrade.id, published=upgrade.state == State.COMPLETED or upgrade.cutover == "progressive")
            )
        elif upgrade.state in WORKING:
            queue = upgrade.id
    return Role(tuple(derive), queue)


def lacking(
    given: Role, model: EmbeddingModel, side_dimension: int | None, stack: Sequence[UpgradeRow], pinned: Pinned
) -> UpgradeRow | None:
    """An upgrade that could neither transform such items nor leave them out: a write must not make it fail. None if none."""
    wanting = {*(each.upgrade for each in given.derive), given.queue}
    made = {model.name: 0}
    for upgrade in stack:
        if upgrade.id not in wanting or _refused(upgrade):
            continue
        by = choose(upgrade, pinned[upgrade.id], made, side_dimension)
        if by is not None:
            made[by.target] = made[by.source] + 1
        elif upgrade.missing_side != "skip":
            return upgrade
    return None


def _refused(upgrade: UpgradeRow) -> bool:
    """Whether validation refused the upgrade. A retry validates again, so items that it could not transform may be written."""
    return upgrade.state == State.FAILED and upgrade.started_at is None


def check_reachable(
    gallery: GalleryRow,
    model: EmbeddingModel,
    upgrades: Sequence[UpgradeRow],
    stack: Sequence[UpgradeRow],
    registry: Registry,
) -> None:
    """Refuse items of a model that is none of the gallery's, unless a backward transformation leads from it.

    A model that was left behind stays so: a backward transformation serves its queries, not its writes.

    Args:
        gallery: where they shall go.
        model: what embedded them.
        upgrades: all of the gallery's.
        stack: the open ones.
        registry: all models and transformations.

    Raises:
        ModelRetired: a finalized upgrade left the model behind.
        NoRoute: the gallery's queries could not reach such items.
    """
    if any(u.source.name == model.name and u.state == State.FINALIZED for u in upgrades):
        raise errors.ModelRetired(
            f"{gallery.name} was upgraded from {model.name} for good: embed with {gallery.model.name}", pointer="/model"
        )
    if stack and stack[-1].active:
        raise errors.NoRoute(
            f"{gallery.name} is being upgraded from {stack[-1].source.name} to {stack[-1].target.name}, which has no way for "
            f"vectors of {model.name}: send them in one of these two, or once the upgrade is over",
            pointer="/model",
        )
    if registry.between(model.name, gallery.model.name, "backward", {}) is not None:
        return
    raise errors.NoRoute(
        f"{gallery.name} holds vectors of {gallery.model.name}; to add vectors of {model.name}, start an upgrade to it or "
        f"register a backward transformation from {model.name} to {gallery.model.name}",
        pointer="/model",
    )
