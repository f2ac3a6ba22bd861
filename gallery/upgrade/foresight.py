"""A gallery as searches will see it later in an upgrade, so that quality can be measured before they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sqlalchemy import select

from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ColumnRow, SegmentRow, UpgradeRow
from gallery.snapshot import Snapshot, World
from gallery.store import Store
from gallery.upgrade import sources
from gallery.views import SegmentView, open_searchable


def running(store: Store, world: World, row: UpgradeRow) -> World:
    """The gallery as searches see it while the upgrade runs: by its transformations and its policy for side-information.

    Once an upgrade runs, searches see it so anyway; of a dry run, they never do.
    """
    snapshot = world.snapshot(row.gallery_name)
    with store.catalog.reading() as session:
        pins = upgrade_rows.pins(session, snapshot.gallery_id, also=row.id)
    return _with(world, replace(snapshot, pinned=pins.pinned, zeros_for=pins.zeros_for))


def upgraded(store: Store, world: World, row: UpgradeRow) -> World:
    """The gallery as queries of the target model will see it after the upgrade; columns not made yet are mapped on demand.

    As `running`, without the segments that the upgrade will skip, unless a backward transformation reaches them.
    """
    seen = running(store, world, row)
    with store.catalog.reading() as session:
        pinned = upgrade_rows.transformations(session, row)

    def will_have(view: SegmentView) -> bool:
        made = {model: len(column.lineage) for model, column in view.columns.items()}
        return row.missing_side != "skip" or sources.choose(row, pinned, made, view.side_dimension) is not None

    return _reached(seen, row, will_have)


def cut_over(store: Store, world: World, row: UpgradeRow) -> World:
    """As a query of the target model alone sees it after the cutover: every column that the upgrade made is searched."""
    snapshot = world.snapshot(row.gallery_name)
    model = world.model(row.target.name)
    with store.catalog.reading() as session:
        made = session.execute(
            select(ColumnRow, SegmentRow.rows)
            .join(SegmentRow)
            .where(ColumnRow.upgrade_id == row.id, ~ColumnRow.published, SegmentRow.retired_at.is_(None))
        ).all()
    added = {column.segment_id: open_searchable(store.files, column, model, rows) for column, rows in made}

    def after(view: SegmentView) -> SegmentView:
        if view.id not in added:
            return view
        return replace(view, columns={**view.columns, model.name: added[view.id]})

    seen = _with(world, snapshot.of(after(view) for view in snapshot.segments))
    return _reached(seen, row, lambda _: False)


def _reached(world: World, row: UpgradeRow, will_have: Callable[[SegmentView], bool]) -> World:
    """Leave out segments that neither have nor will have the target's column, unless a backward transformation reaches them."""
    snapshot, target = world.snapshot(row.gallery_name), row.target.name
    if world.registry.between(target, row.source.name, "backward", snapshot.pinned) is not None:
        return world
    return _with(world, snapshot.of(view for view in snapshot.segments if target in view.columns or will_have(view)))


def _with(world: World, snapshot: Snapshot) -> World:
    return replace(world, galleries={**world.galleries, snapshot.gallery: snapshot})
