"""Quality while an upgrade runs, and before its cutover; the gate is judged by it.

A progressive upgrade is measured by the worker that has just published a segment, as often as the share of time allows that
measuring may take. The results are kept as a curve of quality over progress.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import structlog

from gallery import errors
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import UpgradeRow, now, rfc3339
from gallery.catalog.transaction import in_words
from gallery.search.run import Searcher
from gallery.snapshot import Galleries
from gallery.store import Store
from gallery.upgrade import foresight, gate, quality
from gallery.upgrade.moves import move
from gallery.upgrade.progress import progress
from gallery.upgrade.states import State

#: most points of the curve
POINTS = 128
_STEP = 0.01  # share of the items between two points: a curve needs no more
# The most time between two points, for upgrades whose segments take long: what is written meanwhile changes quality too.
_WAIT = timedelta(seconds=10)
log = structlog.get_logger()


def due(measured: Mapping[str, Any], fraction: float, moment: datetime, share: float) -> bool:
    """Whether quality is to be measured again. Pure.

    Args:
        measured: of the last time, `at`, `fraction` and `seconds` that it took; empty if it was never measured.
        fraction: of the items, what is done now.
        moment: this one.
        share: most of the time that measuring may take.
    """
    if not measured:
        return True
    since = moment - datetime.fromisoformat(measured["at"])
    enough = fraction - measured["fraction"] >= _STEP or since >= _WAIT or since < timedelta(0)
    return enough and rested(measured, moment, share)


def rested(measured: Mapping[str, Any], moment: datetime, share: float) -> bool:
    """Whether measuring would keep to its share of the time. Pure; arguments as of `due`."""
    if not measured:
        return True
    since = (moment - datetime.fromisoformat(measured["at"])).total_seconds()
    # Where the clock was set back, nobody knows how long ago it was.
    return since < 0 or since >= measured["seconds"] * (1 / share - 1)


def curve(points: Sequence[Mapping[str, Any]], point: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The curve with one more point, which replaces points at nearly the same fraction; the first point stays. Pure."""

    def part(of: Mapping[str, Any]) -> int:
        return int(of["fraction"] * (POINTS - 2))

    first = [each for each in points[:1] if each["fraction"] < point["fraction"]]
    return [*first, *(each for each in points[1:] if part(each) < part(point)), point]


def begun(measured: Mapping[str, Any] | None, at: datetime) -> dict[str, Any]:
    """What a progressive upgrade's quality holds before its first segment."""
    return _seen({}, measured, 0.0, at, 0.0)


def look(store: Store, galleries: Galleries, searcher: Searcher, upgrade_id: str) -> None:
    """Measure a progressive upgrade that runs, if that is due; where its gate is missed, pause it.

    What cannot be measured now stops nothing: it is measured again before the upgrade completes.
    """
    with store.catalog.reading() as session:
        row = upgrade_rows.upgrade_row(session, upgrade_id)
        fraction = progress(session, row).fraction
        known = row.quality.get("measured") or {}
        if row.state != State.RUNNING or row.cutover != "progressive":
            return
        if not due(known, fraction, now(), store.settings.quality_share) or not (
            probes := quality.stored(session, row)
        ):
            return
    started = time.monotonic()
    try:
        world = galleries.refresh(row.gallery_name)
        measured = quality.compare(searcher, row, probes, before=world, after=world).measured()
    except errors.GalleryError as error:
        log.warning("quality_not_measured", upgrade=upgrade_id, error=in_words(error))
        return
    _record(store, upgrade_id, measured, fraction, time.monotonic() - started)


def before_cutover(
    store: Store, galleries: Galleries, searcher: Searcher, upgrade_id: str
) -> quality.Comparison | None:
    """What the probes find once every column that the upgrade made is searched; None if there are no probes."""
    with store.catalog.reading() as session:
        row = upgrade_rows.upgrade_row(session, upgrade_id)
        probes = quality.stored(session, row)
    if not probes:
        return None
    world = galleries.refresh(row.gallery_name)
    upgraded = foresight.cut_over(store, world, row)
    return quality.compare(searcher, row, probes, before=world, after=upgraded)


def verified(row: UpgradeRow, compared: quality.Comparison | None, at: datetime) -> dict[str, Any]:
    """An upgrade's quality after it was measured on the upgraded columns, and the gate judged by that.

    Where searches do not see those columns yet, the result is `expected_after`; in a progressive upgrade it is `now`.
    """
    measured = quality.Measured() if compared is None else compared.measured()
    found = dict(row.quality)
    if compared is not None:
        found |= {"before": measured.before}
        if row.cutover == "progressive":
            found = _seen(found, measured.after, 1.0, at, 0.0)
        else:
            found |= {"expected_after": measured.after}
    return gate.judged(found, measured.shortfalls(row.gate, gate.UPGRADED), rfc3339(at))


def served(row: UpgradeRow) -> dict[str, Any]:
    """The quality of an upgrade whose columns are searched from now on."""
    expected = row.quality.get("expected_after")
    return dict(row.quality) if row.cutover == "progressive" or expected is None else {**row.quality, "now": expected}


def _record(store: Store, upgrade_id: str, measured: quality.Measured, fraction: float, seconds: float) -> None:
    with store.catalog.transaction() as tx:
        row = upgrade_rows.upgrade_row(tx.session, upgrade_id, lock=True)
        if row.state != State.RUNNING:
            return
        moment = now()
        missed = measured.shortfalls(row.gate, gate.NOW)
        found = _seen({**row.quality, "before": measured.before}, measured.after, fraction, moment, seconds)
        row.quality = gate.judged(found, missed, rfc3339(moment))
        if gate.stops(row.quality):
            move(tx.session, row, State.PAUSED, error=gate.in_words(missed))


def _seen(
    found: Mapping[str, Any], after: Mapping[str, Any] | None, fraction: float, at: datetime, seconds: float
) -> dict[str, Any]:
    """Quality with one more measurement of what searches see."""
    told = {
        **found,
        "now": after,
        "measured": {"at": rfc3339(at), "fraction": fraction, "seconds": seconds},
    }
    if after is not None:
        told["by_progress"] = curve(found.get("by_progress") or [], {"fraction": fraction, **after})
    return told
