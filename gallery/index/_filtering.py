"""How a segment is searched where only some of its rows may be found: which way is cheapest. Pure."""

from __future__ import annotations

from enum import Enum, auto
from math import ceil, sqrt

# How many rows can be compared exactly in the time that an index takes to propose one. Measured with 50,000 x 128 on two
# cores: an HNSW search with one row in five selected takes as long as comparing those 10,000, 0.5 ms.
EXACT_ROWS_PER_PROPOSED = 50

# Where fewer than one row in this many is selected, an index of lists is told which rows to read. Where more are, it is
# cheaper to let it propose a few rows more and to drop what is not selected: of 100,000 x 128 with 40 % selected 0.9 ms
# against 1.3, with 20 % 1.3 against 1.1.
SPARSE = 4
# Up to this many selected rows are all compared, which is as fast as reading lists and misses nothing: 10,000 x 128 took
# 0.7 ms, and lists took 0.8 to 0.9.
FEW = 10_000


class How(Enum):
    """A way to search some rows of a segment."""

    #: as if all were selected: the index proposes more than wanted, and what is not selected is dropped
    SIEVE = auto()
    #: lists are read for selected rows only, more and more of them until that changes nothing
    LISTS = auto()
    #: every selected row is compared
    EXACT = auto()


def how(rows: int, selected: int, k: int, *, by_lists: bool) -> How:
    """The cheapest way that finds the best `k`.

    Args:
        rows: rows of the segment.
        selected: how many of them may be found, at least 1.
        k: how many are wanted.
        by_lists: whether the index can read lists for selected rows only.
    """
    if selected == rows:
        return How.SIEVE
    effort = rows / selected
    if by_lists and effort > SPARSE:
        return How.EXACT if selected <= max(FEW, EXACT_ROWS_PER_PROPOSED * pool(k, 1)) else How.LISTS
    return How.EXACT if selected <= EXACT_ROWS_PER_PROPOSED * pool(k, effort) else How.SIEVE


def pool(k: int, effort: float) -> int:
    """How many rows to propose so that `k` of them are selected, unless selected rows are rare near the query.

    `effort` is the number of rows for each selected one, so `k * effort` rows hold `k` selected ones on average. Some more are
    proposed for chance, whose spread grows with the root of the share that is left out: nearly twice as many where most
    rows are left out, and hardly more where few are.
    """
    return ceil((k + (k + 16) * sqrt(1 - 1 / effort)) * effort)
