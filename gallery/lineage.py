"""Where a stored vector came from: what was applied to the vector that a model made, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

#: the number type that everything is computed in where nothing else is said
EXACT = "float32"


class Step(NamedTuple):
    """One transformation that was applied."""

    #: its name
    transformation: str
    #: SHA-256 of the artifact that did it
    artifact: str
    #: the model whose column it was applied to; of the first step, the model that made the vector
    source: str
    #: the number type that it was computed in; steps from before that was written down were computed in float32
    computed_in: str = EXACT


#: the oldest step first; empty where the column is native
Lineage = tuple[Step, ...]


def as_json(lineage: Lineage) -> list[dict[str, str]]:
    """A lineage as the catalog keeps it. What goes without saying is left out, so that older code can read it too."""
    return [
        {name: value for name, value in step._asdict().items() if (name, value) != ("computed_in", EXACT)}
        for step in lineage
    ]


def from_json(steps: Iterable[Mapping[str, Any]]) -> Lineage:
    """The lineage that the catalog keeps."""
    return tuple(Step(**step) for step in steps)
