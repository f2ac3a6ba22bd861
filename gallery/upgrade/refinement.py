"""Quality over the refined part of an upgraded gallery: the items whose vector the target model itself made.

After an upgrade is completed, items may be embedded again, those first that gain most by it. Their native vectors replace the
derived ones. As their number grows, a worker asks the probes again, within the share of its time that measuring may take. So an
operator sees what the next thousand items are worth.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from gallery import errors
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.holdings import Held, held
from gallery.catalog.tables import GalleryRow, ProbeRow, UpgradeRow, now, rfc3339
from gallery.catalog.transaction import in_words
from gallery.search.run import Searcher
from gallery.snapshot import Galleries
from gallery.store import Store
from gallery.upgrade import live, progress, quality
from gallery.upgrade.states import State

log = structlog.get_logger()


class Refined(NamedTuple):
    """How far the refinement of a gallery is; live items only."""

    native: int
    derived: int

    @property
    def fraction(self) -> float:
        """Of the items with a vector of the target model, those whose vector it made itself."""
        return self.native / max(1, self.native + self.derived)


class Refinements:
    """The refinements of all galleries, as a worker looks after them; it remembers where it counted and found nothing new."""

    def __init__(self, store: Store, galleries: Galleries, searcher: Searcher) -> None:
        """Measure with the worker's own searcher."""
        self._store = store
        self._galleries = galleries
        self._searcher = searcher
        #: by upgrade, the version of its gallery at which nothing was new
        self._counted: dict[str, int] = {}
        #: by upgrade, when to look again: counting the items of a large gallery takes time, too
        self._again: dict[str, float] = {}

    def due(self) -> list[str]:
        """The upgrades whose gallery changed since, unless they were measured a moment ago."""
        share, moment = self._store.settings.quality_share, time.monotonic()
        with self._store.catalog.reading() as session:
            changed = [
                upgrade_id
                for upgrade_id, version in _refinable(session)
                if self._counted.get(upgrade_id) != version and self._again.get(upgrade_id, moment) <= moment
            ]
            # Only of these is read what was measured, which may be large: a worker asks twice a second.
            return [
                upgrade_id
                for upgrade_id in changed
                if live.rested(_measured(upgrade_rows.upgrade_row(session, upgrade_id)), now(), share)
            ]

    def look(self, upgrade_id: str) -> bool:
        """Measure if more was refined since the last time; False if it was not, or if it is too early for another point."""
        started = time.monotonic()
        try:
            return self._look(upgrade_id, started)
        finally:
            ended = time.monotonic()
            self._again[upgrade_id] = ended + (ended - started) * (1 / self._store.settings.quality_share - 1)

    def _look(self, upgrade_id: str, started: float) -> bool:
        with self._store.catalog.reading() as session:
            row = upgrade_rows.upgrade_row(session, upgrade_id)
            gallery = session.get(GalleryRow, row.gallery_id or 0)
            counted, known, probes = refined(session, row), _measured(row), quality.stored(session, row)
        if gallery is None:
            return False
        if known and known["items"] == list(counted):
            self._counted[upgrade_id] = gallery.version
            return False
        if not live.due(known, counted.fraction, now(), self._store.settings.quality_share):
            return False
        try:
            world = self._galleries.refresh(gallery.name)
            found = quality.compare(self._searcher, row, probes, before=world, after=world).measured().after
        except errors.GalleryError as error:
            log.warning("refinement_not_measured", upgrade=upgrade_id, error=in_words(error))
            found = None
        if found is None:  # nothing that could be asked; perhaps with the next version
            self._counted[upgrade_id] = gallery.version
            return False
        self._record(upgrade_id, counted, found, time.monotonic() - started)
        self._counted[upgrade_id] = gallery.version
        return True

    def _record(self, upgrade_id: str, counted: Refined, found: Mapping[str, Any], seconds: float) -> None:
        with self._store.catalog.transaction() as tx:
            row = upgrade_rows.upgrade_row(tx.session, upgrade_id, lock=True)
            points = progress.quality(row)["by_refinement"]
            point = {"fraction": counted.fraction, "items": counted.native, **found}
            measured = {
                "at": rfc3339(now()),
                "fraction": counted.fraction,
                "seconds": seconds,
                "items": list(counted),
            }
            row.quality = {
                **row.quality,
                "refinement": {"measured": measured, "points": live.curve(points, point)},
            }


def refined(session: Session, row: UpgradeRow) -> Refined:
    """Count the items of an upgrade's gallery by what made their vectors of the target model."""
    gallery = row.gallery_id or 0  # deleted, and holds nothing
    of_target = held(session, [gallery])[gallery].get(row.target.name, Held())
    return Refined(of_target.native_items, of_target.derived_items)


def _measured(row: UpgradeRow) -> Mapping[str, Any]:
    return (row.quality.get("refinement") or {}).get("measured") or {}


def _refinable(session: Session) -> list[tuple[str, int]]:
    """Of each gallery the newest upgrade to its model, completed or finalized, where there are probes to ask; and its version."""
    probed = select(ProbeRow.gallery_id).where(ProbeRow.gallery_id == GalleryRow.id).exists()
    newest = (
        select(func.max(UpgradeRow.id), GalleryRow.version)
        .join(GalleryRow, GalleryRow.id == UpgradeRow.gallery_id)
        .where(
            UpgradeRow.state.in_([State.COMPLETED, State.FINALIZED]),
            ~UpgradeRow.dry_run,
            UpgradeRow.target_id == GalleryRow.model_id,
            probed,
        )
        .group_by(GalleryRow.id, GalleryRow.version)
    )
    return [(upgrade_id, version) for upgrade_id, version in session.execute(newest)]
