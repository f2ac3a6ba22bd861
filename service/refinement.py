"""Which items would gain most from being embedded again: those whose derived embedding is least certain (FastFill)."""

from __future__ import annotations

import numpy as np

from gallery import errors
from gallery.catalog import models as model_rows
from gallery.catalog.tables import UpgradeRow
from gallery.snapshot import SegmentView, Snapshot
from models.runtime import Transform, Vectors
from service.errors import NoUncertainty
from service.process import Process


def least_certain(process: Process, upgrade: UpgradeRow, page: slice) -> tuple[list[str], int]:
    """A slice of the ids of live derived items, the least certain first, and how many there are in all.

    Everything is predicted anew for each page: a segment costs as much as transforming it.

    Raises:
        NoUncertainty: the transformation has no uncertainty head, or what it was applied to is gone.
        GalleryNotFound: the gallery was deleted.
    """
    transformation = model_rows.as_transformation(upgrade.transformation)
    transform = process.store.transforms.get(upgrade.artifact)
    if not isinstance(transform, Transform) or not transform.has_uncertainty:
        raise NoUncertainty(
            f"{transformation.name} predicts no uncertainty: fit one with an uncertainty head (FastFill), and upgrade with it"
        )
    snapshot = process.galleries.refresh().snapshot(upgrade.gallery_name)
    if snapshot.gallery_id != upgrade.gallery_id:
        raise errors.GalleryNotFound(f"the gallery of this upgrade, {upgrade.gallery_name}, was deleted")
    views = _derived(snapshot, upgrade)
    predicted = [_predicted(transform, view, upgrade.source.name) for view in views]
    places = [(at, row) for at, view in enumerate(views) for row in _live(view)]
    values = np.concatenate(
        [values[_live(view)] for view, values in zip(views, predicted, strict=True)] or [np.empty(0)]
    )
    order = np.argsort(-values, kind="stable")[page]
    return [views[places[at][0]].ids[places[at][1]] for at in order], len(places)


def _derived(snapshot: Snapshot, upgrade: UpgradeRow) -> list[SegmentView]:
    source, target = upgrade.source.name, upgrade.target.name
    views = [view for view in snapshot.segments if target in view.columns and view.columns[target].origin == "derived"]
    if any(source not in view.columns for view in views):
        raise NoUncertainty(
            f"the upgrade is finalized, so the {source} vectors that it would be predicted from are gone"
        )
    return views


def _predicted(transform: Transform, view: SegmentView, source: str) -> Vectors:
    side = view.side
    if side is None and transform.side_dimension is not None:
        side = np.zeros((view.rows, transform.side_dimension), np.float32)
    found = transform.uncertainty(view.columns[source].vectors, side)
    return np.zeros(view.rows, np.float32) if found is None else found


def _live(view: SegmentView) -> list[int]:
    return list(range(view.rows)) if view.selected is None else np.flatnonzero(view.selected).tolist()
