"""The table: ratios, the bars that they are held to, and what the run as a whole says. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True, slots=True)
class Bar:
    """What a ratio may be."""

    kind: Literal["<=", ">="]
    limit: float

    def holds(self, ratio: float) -> bool:
        """Whether a ratio is on the right side of it; NaN is on neither."""
        return ratio <= self.limit if self.kind == "<=" else ratio >= self.limit

    def __str__(self) -> str:
        return f"{self.kind} {self.limit:g}"


def at_most(limit: float) -> Bar:
    """Smaller is better."""
    return Bar("<=", limit)


def at_least(limit: float) -> Bar:
    """Larger is better."""
    return Bar(">=", limit)


class Pair(NamedTuple):
    """What one round measured: ours, and right after it what it is compared with."""

    ours: float
    against: float

    @property
    def ratio(self) -> float:
        """Ours for each one of the other."""
        return self.ours / self.against if self.against else float("nan")


@dataclass(frozen=True, slots=True)
class Line:
    """One measure."""

    what: str
    #: of the two figures, such as `ms`; empty where they are counts or ratios themselves
    unit: str
    ours: float
    against: float
    #: the median over the rounds, and the least and the largest of them
    ratio: float
    least: float
    largest: float
    rounds: int
    #: None where the figure is shown and not judged
    bar: Bar | None
    #: what a reader must know to judge it: recall, sizes, what is counted
    note: str = ""

    @property
    def missed(self) -> bool:
        """Whether it has a bar that does not hold."""
        return self.bar is not None and not self.bar.holds(self.ratio)


def compared(what: str, pairs: Sequence[Pair], bar: Bar | None = None, *, unit: str = "", note: str = "") -> Line:
    """The line of a measure that was taken in rounds.

    The ratio is the median of the rounds' ratios, and not the ratio of two medians: what slows the machine for a moment
    slows both sides of a round.

    Raises:
        ValueError: no round.
    """
    if not pairs:
        raise ValueError(f"{what}: nothing was measured")
    ratios = sorted(pair.ratio for pair in pairs)
    return Line(
        what=what,
        unit=unit,
        ours=median(pair.ours for pair in pairs),
        against=median(pair.against for pair in pairs),
        ratio=median(ratios),
        least=ratios[0],
        largest=ratios[-1],
        rounds=len(pairs),
        bar=bar,
        note=note,
    )


def alone(what: str, values: Sequence[float], bar: Bar | None = None, *, unit: str = "", note: str = "") -> Line:
    """The line of a measure that is judged as it is: the median of the rounds decides."""
    return _alone(what, values, median(values), bar, unit, note)


def counted(what: str, values: Sequence[float], bar: Bar | None = None, *, note: str = "") -> Line:
    """The line of a count, such as failures: the worst of the rounds decides."""
    worst = min(values) if bar is not None and bar.kind == ">=" else max(values)
    return _alone(what, values, worst, bar, "", note)


@dataclass(frozen=True, slots=True)
class Group:
    """What one group of measures gave: its lines, or why there are none."""

    name: str
    lines: tuple[Line, ...] = ()
    #: it could not be measured here, and need not be
    skipped: str | None = None
    #: it ought to have been measured
    failed: str | None = None

    @property
    def good(self) -> bool:
        """Whether nothing was missed and nothing went wrong."""
        return self.failed is None and not any(line.missed for line in self.lines)


def exit_code(groups: Iterable[Group]) -> int:
    """0 where every bar holds; a group that was skipped misses none."""
    return 0 if all(group.good for group in groups) else 1


HEAD = ("measure", "ours", "against", "ratio", "of rounds", "bar", "")


def cells(line: Line) -> tuple[str, ...]:
    """A line as the columns of `HEAD`."""
    single = math.isnan(line.against)
    return (
        line.what + (f" ({line.note})" if line.note else ""),
        figure(line.ours, line.unit),
        "" if single else figure(line.against, line.unit),
        "" if single else f"{line.ratio:.3g}",
        f"{figure(line.least, '')} to {figure(line.largest, '')} ({line.rounds})",
        "" if line.bar is None else str(line.bar),
        "" if line.bar is None else ("MISSED" if line.missed else "holds"),
    )


def figure(value: float, unit: str) -> str:
    """A number for people: three digits that mean something."""
    digits = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def markdown(groups: Iterable[Group]) -> str:
    """All tables, for the documents."""
    parts = []
    for group in groups:
        parts.append(f"### {group.name}\n")
        if why := group.failed or group.skipped:
            parts.append(f"{'Failed' if group.failed else 'Not measured'}: {why}\n")
        if group.lines:
            rows = [HEAD, ("---",) * len(HEAD), *map(cells, group.lines)]
            parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")
    return "\n".join(parts)


def document(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """All figures, for programs; no number that JSON does not have."""
    return [asdict(group) | {"lines": [_plain(line) for line in group.lines]} for group in groups]


def _alone(what: str, values: Sequence[float], judged: float, bar: Bar | None, unit: str, note: str) -> Line:
    return Line(what, unit, judged, math.nan, judged, min(values), max(values), len(values), bar, note)


def _plain(line: Line) -> dict[str, Any]:
    fields = {
        name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(line).items()
    }
    return fields | {"bar": None if line.bar is None else str(line.bar), "missed": line.missed}
