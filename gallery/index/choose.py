"""Which index a segment gets. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gallery.index.registry import backend, names

AUTO = "auto"
EXACT = "flat"


class Choice(NamedTuple):
    """A backend and its parameters, complete."""

    kind: str
    parameters: dict[str, Any]


def check(settings: Mapping[str, Any]) -> None:
    """Refuse index settings that cannot be followed.

    Raises:
        ValueError: unknown kind or parameter.
    """
    choose(settings, rows=1, exact_below=0)


def choose(settings: Mapping[str, Any], *, rows: int, exact_below: int) -> Choice:
    """The index of a segment of `rows` rows: exact search below a size at which it is as fast as any.

    Args:
        settings: `{"kind": "auto" | a backend's name, ...}` with the backend's own parameters.
        rows: rows of the segment.
        exact_below: segments with fewer rows are searched exactly.

    Raises:
        ValueError: unknown kind or parameter.
    """
    kind = settings.get("kind", AUTO)
    parameters = {name: value for name, value in settings.items() if name != "kind"}
    if kind == AUTO:
        if parameters:
            raise ValueError(f"kind 'auto' takes no parameters, but got {', '.join(sorted(parameters))}")
        kind = "ivf"
    if kind not in names():
        raise ValueError(f"kind {kind!r} is not one of {', '.join((AUTO, *names()))}")
    complete = backend(kind).check(parameters)
    return Choice(EXACT, {}) if rows < exact_below else Choice(kind, complete)
