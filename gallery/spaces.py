"""Models and transformations as values: each model is one embedding space, each transformation a map between two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from gallery.arrays import Metric, Space

Direction = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """A registered embedding model version."""

    id: int
    name: str
    dimension: int
    metric: Metric
    #: its vectors have unit length
    normalized: bool
    #: width of the side-information that is stored with its items, if any
    side_dimension: int | None
    fingerprint: str | None
    description: str | None
    created_at: datetime

    @property
    def space(self) -> Space:
        """What decides a score between two of its vectors."""
        return Space(self.metric, self.normalized)


@dataclass(frozen=True, slots=True)
class Transformation:
    """A learned map from one model's space into another's."""

    id: int
    name: str
    source: str
    target: str
    #: forward: old -> new, for the gallery; backward: new -> old, for the query
    direction: Direction
    method: str
    #: SHA-256 of its artifact
    artifact: str
    #: width of the side-information that it needs, null if none
    side_dimension: int | None
    #: what it was measured to be worth; not compared, so that a transformation can be a key of a dictionary
    evaluation: Mapping[str, Any] | None = field(compare=False)
    created_at: datetime

    @property
    def advised(self) -> bool:
        """Whether it may be used where nobody names it.

        A forward one may not where the fit that made it found no gain in an upgrade, or a gain only from scoring with both models
        (`fuse`): a gallery is scored in one space. A backward one always may, since queries of the new model alone are not
        answered without it.
        """
        verdict = (self.evaluation or {}).get("verdict")
        if self.direction == "backward" or not isinstance(verdict, Mapping):
            return True
        # An older verdict does not say what upgrading alone gains.
        return bool(verdict.get("upgrade_gains", verdict.get("decision") != "stay"))

    def takes(self, side_dimension: int | None) -> bool:
        """Whether a segment with side-information of this width (null: none) can go through it."""
        return self.side_dimension is None or self.side_dimension == side_dimension


@dataclass(frozen=True, slots=True)
class Registry:
    """All models and transformations at one moment; immutable."""

    models: Mapping[str, EmbeddingModel]
    #: in the order of registration
    transformations: tuple[Transformation, ...]

    def between(
        self, source: str, target: str, direction: Direction, pinned: Mapping[tuple[str, str], str]
    ) -> Transformation | None:
        """The transformation to use between two models: the one an upgrade is pinned to, else the latest that is advised.

        Derived columns and candidates that are transformed at query time must come from the same transformation, or
        their scores would not compare; so what an upgrade was started with wins.
        """
        fitting = [t for t in self.transformations if (t.source, t.target, t.direction) == (source, target, direction)]
        wanted = pinned.get((source, target))
        latest = next((t for t in reversed(fitting) if t.advised), None)
        return next((t for t in fitting if t.name == wanted), latest)
