"""Checking a backend's own settings, which arrive as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Whole(NamedTuple):
    """A whole number that a backend can be given."""

    default: int
    low: int
    high: int


def checked(kind: str, parameters: Mapping[str, Any], known: Mapping[str, Whole]) -> dict[str, Any]:
    """`parameters` with the defaults of `known` filled in.

    Raises:
        ValueError: a parameter is unknown or out of range; the message names it and the fix.
    """
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(f"{kind} has no parameter {name!r}; it has {', '.join(known) or 'none'}")
        _, low, high = known[name]
        # A bool is an int to Python, but `"nprobe": true` is a mistake.
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{kind} parameter {name!r} must be a whole number from {low} to {high}, not {value!r}")
    return {name: number.default for name, number in known.items()} | dict(parameters)
