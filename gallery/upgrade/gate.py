"""Whether the quality that was measured is good enough to go on. Pure.

A gate is a set of limits. It is judged before the first segment, while a progressive upgrade runs, and before the cutover.
Where it is missed it closes: the upgrade stops and says by how much. A person who resumes an upgrade that had begun goes on
in spite of its gate, which from then on only warns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple


class Limit(NamedTuple):
    """Which measure a limit is about, and in which way it limits it."""

    measure: str
    kind: Literal["floor", "ceiling", "drop"]


#: by name, the limits that a gate may have
LIMITS: Mapping[str, Limit] = {
    "min_cmc1": Limit("cmc1", "floor"),
    "min_recall_at_10": Limit("recall_at_10", "floor"),
    "min_map": Limit("map", "floor"),
    "min_overlap_at_10": Limit("overlap_at_10", "floor"),
    "max_negative_flips": Limit("negative_flips", "ceiling"),
    "max_cmc1_drop": Limit("cmc1", "drop"),
    "max_recall_drop": Limit("recall_at_10", "drop"),
    "max_map_drop": Limit("map", "drop"),
}
#: when the measures were taken; a part of the sentence that says that a limit is missed
EXPECTED, NOW, UPGRADED = "expected after the upgrade", "measured now", "measured on the upgraded columns"
_ROUNDING = 1e-9  # 0.6 - 0.5 is a little more than 0.1


class Shortfall(NamedTuple):
    """A limit that is missed, and by how much, in words."""

    limit: str
    detail: str


def shortfalls(
    gate: Mapping[str, float], before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, what: str
) -> list[Shortfall]:
    """The limits of a gate that are missed; one that nothing was measured for is missed, too.

    Args:
        gate: limit -> number, each limit one of `LIMITS`.
        before: measures of the source model's queries.
        after: measures of the target model's queries.
        what: what `after` is, for the words: one of the constants above.
    """
    found = [(name, _missed(LIMITS[name], limit, before or {}, after or {}, what)) for name, limit in gate.items()]
    return [Shortfall(name, detail) for name, detail in found if detail is not None]


def in_words(found: Sequence[Shortfall]) -> str:
    """All that is missed, as one sentence."""
    return "; ".join(each.detail for each in found)


def judged(quality: Mapping[str, Any], found: Sequence[Shortfall], at: str) -> dict[str, Any]:
    """What an upgrade's quality says of its gate after it was judged at a moment (RFC 3339)."""
    known = quality.get("gate") or {}
    closed = None
    if found:
        since = (known.get("closed") or {}).get("since", at)
        closed = {"limit": found[0].limit, "detail": in_words(found), "since": since}
    return {**quality, "gate": {"closed": closed, "waived": known.get("waived")}}


def closed(quality: Mapping[str, Any]) -> Mapping[str, str] | None:
    """The `limit` that was missed when the gate was judged last, `detail` and `since`; None if it was met."""
    found: Mapping[str, str] | None = (quality.get("gate") or {}).get("closed")
    return found


def stops(quality: Mapping[str, Any]) -> bool:
    """Whether the gate is closed and nobody has decided to go on in spite of it."""
    return closed(quality) is not None and not (quality.get("gate") or {}).get("waived")


def waived(quality: Mapping[str, Any], at: str) -> dict[str, Any]:
    """The quality of an upgrade that a person resumes: a gate that stopped it only warns from now on."""
    if not stops(quality):
        return dict(quality)
    return {**quality, "gate": {**quality["gate"], "waived": at}}


def _missed(limit: Limit, asked: float, before: Mapping[str, Any], after: Mapping[str, Any], what: str) -> str | None:
    """By how much a limit is missed; None if it is met."""
    name, value, earlier = limit.measure, after.get(limit.measure), before.get(limit.measure)
    if value is None or (limit.kind == "drop" and earlier is None):
        return f"the gate asks for {_asked(limit, asked)}, but there are no probes {_wanted(limit)} to measure it with"
    if limit.kind == "floor" and value < asked - _ROUNDING:
        missing = f"{asked - value:.4f} short"
        return f"the gate asks for {_asked(limit, asked)}, and {value:.4f} is {what} ({missing})"
    if limit.kind == "ceiling" and value > asked:
        return f"the gate asks for {_asked(limit, asked)}, and {value:g} is {what} ({value - asked:g} too many)"
    if limit.kind == "drop" and earlier - value > asked + _ROUNDING:
        return (
            f"the gate asks for {_asked(limit, asked)}, and {name} was {earlier:.4f} before and {value:.4f} is {what} "
            f"(a drop of {earlier - value:.4f})"
        )
    return None


def _asked(limit: Limit, asked: float) -> str:
    if limit.kind == "drop":
        return f"a drop of {limit.measure} of at most {asked:g}"
    return f"{limit.measure} of at {'least' if limit.kind == 'floor' else 'most'} {asked:g}"


def _wanted(limit: Limit) -> str:
    if limit.measure == "overlap_at_10":
        return "with vectors of both models"
    return "with relevant ids and vectors of both models"
