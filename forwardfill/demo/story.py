"""The demo's story as values: what it works on, how much is measured, and what happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from forwardfill.answers import Upgrade
from forwardfill.demo.quality import Measurement, Queries
from forwardfill.demo.traffic import Record

Floats = npt.NDArray[np.float32]

OLD, NEW = "old", "new"
SEGMENTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured; the whole test split is always the gallery."""

    #: queries for CMC-1 and for mAP, None for one per item
    short_queries: int | None = None
    whole_queries: int | None = None
    #: searches that must have been answered during the upgrade
    searches: int = 1000
    #: the upgrade is throttled to take at least this long, so that its middle can be seen
    seconds: float = 25.0
    #: finished training stages are kept from one run to the next
    cached: bool = False


class Items(NamedTuple):
    """The test split as a gallery holds it, in random order, so that each segment is a sample of all classes."""

    ids: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    images: npt.NDArray[Any]
    #: (items, dimension) each
    old: Floats
    side: Floats
    new: Floats

    @property
    def batch(self) -> int:
        """Items of one request, so that the requests make `SEGMENTS` segments."""
        return -(-len(self.ids) // SEGMENTS)

    @property
    def old_queries(self) -> Queries:
        return Queries(OLD, self.old, {})

    @property
    def new_queries(self) -> Queries:
        """Queries as a client sends them that runs both encoders during the upgrade."""
        return Queries(NEW, self.new, {OLD: self.old})

    @property
    def naive_queries(self) -> Queries:
        """The naive swap: new vectors sent as if they were of the old model, cut or padded to its dimension."""
        width = self.old.shape[1]
        swapped = np.zeros_like(self.old)
        swapped[:, : min(width, self.new.shape[1])] = self.new[:, :width]
        return Queries(OLD, swapped, {})


@dataclass(slots=True)
class Story:
    """What happened so far."""

    items: Items
    scale: Scale
    measured: dict[str, Measurement] = field(default_factory=dict)
    by_progress: list[Measurement] = field(default_factory=list)
    #: the upgrade that was watched, and the one at full speed
    upgrade: Upgrade = field(init=False)
    unthrottled: Upgrade = field(init=False)
    searches: list[Record] = field(default_factory=list)
    #: seconds of the encoder, and of the requests
    reembedding: tuple[float, float] = (0.0, 0.0)
    #: searches after the rollback, and how many of them answered as before the upgrade
    undone: tuple[int, int] = (0, 0)
    #: measurements for which the upgrade was paused
    pauses: int = 0
