"""The demo's picture: quality over the upgrade's progress, and below it what the searches of that time met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

OLD_COLOUR, NEW_COLOUR, FAILED_COLOUR, GREY = "#8a6d3b", "#1f6fb2", "#c0392b", "#777777"
#: a line in the latencies is the median of so many searches
MEDIAN_OF = 51


class Search(NamedTuple):
    """One search, for the picture."""

    #: seconds since the upgrade started
    at: float
    is_new: bool
    milliseconds: float
    failed: bool


def draw(path: Path, *, title: str, quality: Mapping[str, Any], searches: Sequence[Search], seconds: float) -> None:
    """Draw the picture.

    Args:
        path: a PNG file.
        title: above all.
        quality: that of the report.
        searches: in the order they were sent.
        seconds: how long the upgrade took.
    """
    figure = Figure(figsize=(9, 7.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))
    figure.suptitle(title, fontsize=12)
    left, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    _quality(left, quality, "cmc1", "CMC-1")
    _quality(right, quality, "map", "mAP")
    _latency(figure.add_subplot(grid[1, :]), searches, seconds)
    figure.legend(handles=left.get_lines()[:3], loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def _quality(axes: Axes, quality: Mapping[str, Any], measure: str, name: str) -> None:
    """One measure of new-model queries over the progress, between full re-embedding and the old model."""
    points = [(100 * point["fraction"], 100 * point[measure]) for point in quality["by_progress"]]
    best, before, naive = (100 * quality[key][measure] for key in ("new_new", "old_old", "new_old_naive"))
    axes.plot(*zip(*points, strict=True), "o-", markersize=4, color=NEW_COLOUR, label="new-model queries, upgrading")
    axes.axhline(best, linestyle="--", color=GREY, linewidth=1.2, label="new/new: full re-embedding")
    axes.axhline(before, linestyle="--", color=OLD_COLOUR, linewidth=1.2, label="old/old: before")
    shown = [best, before, *(value for _, value in points)]
    margin = max(1.0, 0.25 * (max(shown) - min(shown)))
    axes.set(xlabel="items upgraded, %", ylabel=f"{name}, %", xlim=(-2, 102))
    axes.set_ylim(min(shown) - margin, min(100 + margin / 4, max(shown) + margin))
    axes.text(0.02, 0.03, f"naive swap: {naive:.1f} %", transform=axes.transAxes, color=FAILED_COLOUR, fontsize=8)
    axes.grid(alpha=0.2)


def _latency(axes: Axes, searches: Sequence[Search], seconds: float) -> None:
    """Each search as a point, and the running median of each model."""
    for is_new, colour, name in ((True, NEW_COLOUR, "new-model queries"), (False, OLD_COLOUR, "old-model queries")):
        shown = [search for search in searches if search.is_new == is_new and not search.failed]
        at, taken = np.array([s.at for s in shown]), np.array([s.milliseconds for s in shown])
        axes.plot(at, taken, ".", markersize=2, alpha=0.25, color=colour)
        if len(shown) >= MEDIAN_OF:
            windows = np.lib.stride_tricks.sliding_window_view(taken, MEDIAN_OF)
            middle = MEDIAN_OF // 2
            axes.plot(at[middle : middle + len(windows)], np.median(windows, axis=1), color=colour, label=name)
    failed = [search for search in searches if search.failed]
    axes.plot(
        [s.at for s in failed],
        [s.milliseconds for s in failed],
        "x",
        color=FAILED_COLOUR,
        label=f"failed searches: {len(failed)} of {len(searches):,}",
    )
    axes.axvspan(0, seconds, color=NEW_COLOUR, alpha=0.06, label="the upgrade")
    axes.set(xlabel="seconds since the upgrade started", ylabel="latency, ms", yscale="log")
    axes.grid(alpha=0.2)
    axes.legend(fontsize=7, loc="upper right", framealpha=0.9)
