"""Which segments an upgrade transforms, and in which order. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple


class Order(StrEnum):
    """In which order segments are transformed."""

    STORED = "stored"
    UNCERTAINTY = "uncertainty"
    MOST_SEARCHED = "most_searched"


class Candidate(NamedTuple):
    """A segment that lacks the target model's column."""

    segment_id: int
    rows: int
    #: mean predicted log-variance of its derived embeddings (FastFill); where none was predicted, it goes last
    uncertainty: float = -math.inf
    #: hits that searches found in it
    hits: int = 0


def ordered(candidates: Sequence[Candidate], order: Order) -> list[Candidate]:
    """The segments in the order of the work; equal ones as they are stored."""
    stored = sorted(candidates, key=lambda c: c.segment_id)
    if order is Order.UNCERTAINTY:
        return sorted(stored, key=lambda c: -c.uncertainty)
    if order is Order.MOST_SEARCHED:
        return sorted(stored, key=lambda c: -c.hits)
    return stored
