"""The benchmark's results as one table, in Markdown and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from models.benchmark.runs import RUNS, Published
from models.evaluation import fraction_closed

Results = dict[str, Any]

HEADER = (
    "| query / gallery | metric | CMC-1 | CMC-5 | mAP | closed | negative flips | new/new: CMC-1 | mAP | seconds "
    "| published CMC-1, CMC-5, mAP | published new/new |"
)


def markdown(results: Results) -> str:
    """Lay the results out: references, methods, then the orders of re-embedding and the image-text models, where measured.

    Numbers are percent: each item of the test split is a query for the others of its class. `closed` tells how much of the
    distance in CMC-1 from old/old to the independent new/new is covered by new/old.
    """
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for metric, references in results["references"].items():
        lines += [_reference(name, metric, found) for name, found in references.items()]
    lines += [_method(row, results["references"][row["metric"]]) for row in results["methods"]]
    for part in (_curves(results.get("curves", {})), _cross_modal(results.get("cross_modal"))):
        lines += part
    return "\n".join(lines) + "\n"


def _reference(name: str, metric: str, found: dict[str, float]) -> str:
    title = {"old_old": "old/old", "naive": "new/old, the naive swap", "new_new": "new/new, independent"}[name]
    return f"| {title} | {metric} | {_three(found)} | | | | | | | |"


def _method(row: dict[str, Any], references: dict[str, dict[str, float]]) -> str:
    before, best = row["old_old"]["cmc1"], references["new_new"]["cmc1"]
    closed = "" if best == before else f"{fraction_closed(before, row['new_old']['cmc1'], best):.0%}"
    alone = row["new_new"]
    own = "" if row["old_old"] == references["old_old"] else f", whose old/old is {_percent(before)}"
    return (
        f"| {row['name']} ({row['direction']}){own} | {row['metric']} | {_three(row['new_old'])} | {closed} "
        f"| {_percent(row['negative_flips'])} | {_percent(alone['cmc1'])} | {_percent(alone['map'])} "
        f"| {row['seconds']:.0f} | {_published(row['name'])} |"
    )


def _published(name: str) -> str:
    found: Published | None = next((run.published for run in RUNS if run.name == name), None)
    if found is None:
        return "|"
    shown = [" ".join(f"{value:.1f}" for value in figures) for figures in (found.new_old, found.new_new, found.old_old)]
    return f"{shown[0]} (old/old {shown[2]}) | {shown[1]}"


def _curves(curves: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    if not curves:
        return
    yield from ("", "| transformation | order of re-embedding | area: CMC-1 | CMC-5 | mAP |", "|---|---|---|---|---|")
    for name, orders in curves.items():
        for order, area in orders.items():
            yield f"| {name} | {order} | {_three(area)} |"


def _cross_modal(found: dict[str, Any] | None) -> Iterator[str]:
    if not found:
        return
    ways = list(next(iter(found["found"].values())))
    yield from ("", "| image-text model: query / gallery | " + " | ".join(ways) + " |", "|---|" + "---|" * len(ways))
    for system, by_way in found["found"].items():
        cells = " | ".join(
            f"{_percent(by_way[way]['by_class'])} / {_percent(by_way[way]['by_concept'])}" for way in ways
        )
        yield f"| {system} | {cells} |"


def _three(found: dict[str, float]) -> str:
    return " | ".join(_percent(found[name]) for name in ("cmc1", "cmc5", "map"))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
