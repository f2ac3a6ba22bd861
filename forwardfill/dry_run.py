"""What a dry run found: each check, what the upgrade would take, and how well it would search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forwardfill.tables import listed
from forwardfill.terminal import say

_MEASURES = ("cmc1", "recall_at_10", "map", "overlap_at_10", "negative_flips")
_THRESHOLDS = ("before", "after", "same_precision", "same_recall", "reason")


def tell(upgrade: Mapping[str, Any]) -> None:
    """Print the report of an upgrade that was asked to change nothing, once it has ended."""
    report: Mapping[str, Any] = upgrade["report"]
    checks = report.get("checks", [])
    if checks:
        listed([{**each, "passed": "yes" if each["passed"] else "no"} for each in checks], "check", "passed", "detail")
        # Whatever is one number or word; what has a structure of its own is told below, or in a check's words.
        estimates = {name: value for name, value in report.items() if not isinstance(value, list | dict)}
        rows = [{"estimate": name.replace("_", " "), "value": _shown(value)} for name, value in estimates.items()]
        listed(rows, "estimate", "value")
    measured = {name: found for name in ("before", "now", "expected_after") if (found := upgrade["quality"][name])}
    if measured:
        rows = [
            {"quality": name, **{each: _shown(found[each]) for each in _MEASURES}} for name, found in measured.items()
        ]
        listed(rows, "quality", *_MEASURES)
    if report.get("score_thresholds"):
        listed(report["score_thresholds"], *_THRESHOLDS)
    say(f"{upgrade['gallery']}: {_outcome(upgrade['state'], [each['passed'] for each in checks])}")


def _outcome(state: str, passed: Sequence[bool]) -> str:
    if state not in ("completed", "failed"):
        return f"the dry run is {state}"
    if state == "failed":
        return f"the upgrade would not start: {passed.count(False)} of {len(passed)} checks did not pass"
    return "the upgrade would start; nothing was changed"


def _shown(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:,.4f}" if value < 1 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
