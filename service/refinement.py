"""Which items would gain most from being embedded again: those whose derived embedding is least certain (FastFill)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gallery import errors
from gallery.arrays import Rows, Vectors
from gallery.catalog.tables import UpgradeRow
from gallery.snapshot import Snapshot
from gallery.views import SegmentView
from service.errors import NoUncertainty
from service.process import Process

if TYPE_CHECKING:
    from models.runtime import Transform

_TENTHS = np.linspace(0, 1, 11)


class Listed(NamedTuple):
    """A slice of what there is to embed again."""

    ids: list[str]
    #: how many there are in all
    total: int
    #: for each tenth of the list, from none of it to all: the share of the predicted variance that is left after it
    left: list[float]


def least_certain(process: Process, upgrade: UpgradeRow, page: slice) -> Listed:
    """A slice of the ids of live derived items, the least certain first.

    To predict a segment costs as much as to transform it. A column never changes, so what was predicted of it is kept for the
    next page, as long as no other upgrade is asked about.

    Raises:
        NoUncertainty: the transformation has no uncertainty head, or what it was applied to is gone.
        GalleryNotFound: the gallery was deleted.
    """
    _predicting(process, upgrade.artifact, upgrade.transformation.name)
    snapshot = process.galleries.refresh().snapshot(upgrade.gallery_name)
    if snapshot.gallery_id != upgrade.gallery_id:
        raise errors.GalleryNotFound(f"the gallery of this upgrade, {upgrade.gallery_name}, was deleted")
    views, target = _derived(snapshot, upgrade), upgrade.target.name
    known, predicted = process.predicted, dict[int, Vectors]()
    for view in views:
        column = view.columns[target].id
        predicted[column] = known[column] if column in known else _predicted(process, view, target)
    process.predicted = predicted
    live = [_live(view) for view in views]
    values = np.concatenate(
        [predicted[view.columns[target].id][rows] for view, rows in zip(views, live, strict=True)]
        or [np.empty(0, np.float32)]
    )
    order = np.argsort(-values, kind="stable")
    starts = np.cumsum([0, *map(len, live)])
    ids = []
    for at in order[page]:
        segment = int(np.searchsorted(starts, at, side="right")) - 1
        ids.append(views[segment].ids[int(live[segment][at - starts[segment]])])
    return Listed(ids, len(values), left_after_tenths(values[order]))


def left_after_tenths(log_variances: NDArray[Any]) -> list[float]:
    """The share of the variance that is left after each tenth of the rows, from none to all. Pure.

    Args:
        log_variances: (n,), the largest first.
    """
    if not len(log_variances):
        return []
    variances = np.exp(log_variances.astype(np.float64) - float(log_variances[0]))
    gone = np.concatenate([[0.0], np.cumsum(variances)])
    return [float(1 - gone[round(tenth * len(variances))] / gone[-1]) for tenth in _TENTHS]


def _predicting(process: Process, artifact: str, name: str) -> Transform:
    """A transformation that predicts how certain its result is."""
    transform = process.store.transforms.get(artifact)
    from models.runtime import Transform  # noqa: PLC0415 - whoever loaded it has imported PyTorch by now

    if not isinstance(transform, Transform) or not transform.has_uncertainty:
        raise NoUncertainty(
            f"{name} predicts no uncertainty: fit one with an uncertainty head (FastFill), and upgrade with it"
        )
    return transform


def _derived(snapshot: Snapshot, upgrade: UpgradeRow) -> list[SegmentView]:
    target = upgrade.target.name
    views = [view for view in snapshot.segments if target in view.columns and view.columns[target].origin == "derived"]
    gone = {step.source for view in views if (step := view.columns[target].lineage[-1]).source not in view.columns}
    if gone:
        raise NoUncertainty(
            f"the upgrade is finalized, so the {min(gone)} vectors that it would be predicted from are gone"
        )
    return views


def _predicted(process: Process, view: SegmentView, target: str) -> Vectors:
    """By what made the segment's column, from what it was made of."""
    step = view.columns[target].lineage[-1]
    transform = _predicting(process, step.artifact, step.transformation)
    source, side = step.source, view.side
    if side is None and transform.side_dimension is not None:
        side = np.zeros((view.rows, transform.side_dimension), np.float32)
    found = transform.uncertainty(view.columns[source].vectors, side)
    return np.zeros(view.rows, np.float32) if found is None else found


def _live(view: SegmentView) -> Rows:
    return np.arange(view.rows) if view.selected is None else np.flatnonzero(view.selected)
