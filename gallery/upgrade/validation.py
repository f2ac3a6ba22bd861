"""Take an upgrade from `pending` to `running`, or say why not. A dry run ends here, and has changed nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ProbeRow, UpgradeRow, now
from gallery.search.exact import search_exactly
from gallery.search.run import Searcher
from gallery.snapshot import Galleries
from gallery.store import Store
from gallery.upgrade import foresight, gate, live, order, quality
from gallery.upgrade.moves import held, move
from gallery.upgrade.plan import Candidate, Order
from gallery.upgrade.preflight import Report, preflight
from gallery.upgrade.states import State


@dataclass(slots=True)
class _Findings:
    """What was measured before the first write."""

    report: Report
    quality: dict[str, Any] = field(default_factory=dict)
    work: list[Candidate] = field(default_factory=list)


def validate(
    store: Store, galleries: Galleries, searcher: Searcher, upgrade_id: str, between: Callable[[], None]
) -> bool:
    """Check, measure, judge, and put the work in order. Safe to repeat.

    Args:
        store: where the upgrade is.
        galleries: what searches of this process see.
        searcher: of this process.
        upgrade_id: which.
        between: is called often while every item is mapped and scored; what it raises ends the step, and nothing is changed.
    """
    with store.catalog.transaction() as tx:
        row = upgrade_rows.upgrade_row(tx.session, upgrade_id, lock=True)
        if row.state == State.PENDING:
            move(tx.session, row, State.VALIDATING)
        if row.state != State.VALIDATING:
            return False
    found = _measured(store, galleries, searcher, row, between)
    error = found.report.error
    with store.catalog.transaction("validate") as tx:
        row, _ = held(tx.session, row.id)
        if row.state != State.VALIDATING:
            return False
        row.report, row.error = {**row.report, **found.report.told()}, error
        row.quality = {**row.quality, **found.quality}
        upgrade_rows.reorder(tx.session, row.id, (each.segment_id for each in found.work))
        then = State.FAILED if error else State.COMPLETED if row.dry_run else State.RUNNING
        move(tx.session, row, then, **({"error": error} if error else {}))
    return True


def _measured(
    store: Store, galleries: Galleries, searcher: Searcher, row: UpgradeRow, between: Callable[[], None]
) -> _Findings:
    found = _Findings(preflight(store, row))
    asked = [each["before"] for each in row.report.get("score_thresholds", ())]
    with store.catalog.reading() as session:
        probes = quality.stored(session, row)

    def gated() -> tuple[dict[str, Any], str]:
        return _gated(store, galleries, searcher, row, probes, asked, found, partial(search_exactly, between=between))

    def ordered() -> tuple[dict[str, Any], str]:
        found.work = order.measure(store, row)
        return {**order.told(found.work, Order(row.order))}, f"segments go as {row.order}"

    if _usable(found.report):
        found.report.make("quality", gated)
        found.report.make("order", ordered)
    return found


def _usable(report: Report) -> bool:
    """Whether the transformation maps this gallery's vectors at all, so that more can be asked of it."""
    return all(each["passed"] for each in report.checks if each["check"] in ("artifact", "transformation"))


def _gated(
    store: Store,
    galleries: Galleries,
    searcher: Searcher,
    row: UpgradeRow,
    probes: Sequence[ProbeRow],
    asked: Sequence[float],
    found: _Findings,
    exactly: quality.Ask,
) -> tuple[dict[str, Any], str]:
    """Measure before, now and after. A gate that is missed is a refusal of its own; the measures are reported all the same."""
    world = galleries.refresh(row.gallery_name)
    seen, upgraded = foresight.running(store, world, row), foresight.upgraded(store, world, row)
    expected = quality.compare(searcher, row, probes, before=seen, after=upgraded, ask=exactly)
    measured = expected.measured()
    if probes:
        now_ = quality.compare(searcher, row, probes, before=seen, after=seen).measured().after
        found.quality = {"before": measured.before, "now": now_, "expected_after": measured.after}
        if row.cutover == "progressive":
            found.quality |= live.begun(now_, now())
    missed = measured.shortfalls(row.gate, gate.EXPECTED)
    if missed:
        found.report.refuse("gate", gate.in_words(missed))
    thresholds = quality.thresholds(world, row, asked, expected)
    return {"score_thresholds": thresholds} if asked else {}, _in_words(row, probes, missed, measured)


def _in_words(
    row: UpgradeRow, probes: Sequence[ProbeRow], missed: Sequence[gate.Shortfall], measured: quality.Measured
) -> str:
    if not probes:
        return "not measured: the gallery has no probes"
    if not row.gate:
        return "; ".join([f"measured with {len(probes)} probes", "no limit was asked for", *_falls(measured)])
    return f"measured with {len(probes)} probes; {len(missed)} of {len(row.gate)} limits are missed"


def _falls(measured: quality.Measured) -> Iterator[str]:
    """What the upgrade would make worse, in words for an operator who set no limit and may not look at the numbers."""
    before, after = measured.before or {}, measured.after or {}
    for name in ("cmc1", "recall_at_10", "map"):
        was, will_be = before.get(name), after.get(name)
        if measured.paired and was is not None and will_be is not None and will_be < was:
            yield f"{name} falls from {was:.3f} to {will_be:.3f}"
