"""How much memory a worker needs, and how much there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_FLOAT32 = 4
_LINKS = 160  # bytes per row beside its vector, in a graph of 16 links a row; inverted lists take 8


def needed(
    *,
    block: int,
    dimensions: tuple[int, int | None, int],
    architecture: Mapping[str, Any],
    indexed_rows: int,
    segments: int,
) -> int:
    """About how many bytes a worker takes at once for the segments that it has under way. Pure.

    Args:
        block: rows that are transformed together.
        dimensions: of the source, of the side-information if it takes any, and of the target.
        architecture: what the artifact declares; its widest layer decides what lies between two layers.
        indexed_rows: rows of the largest segment that gets an index file; its index is built in memory.
        segments: how many may be under way, each of which is transformed or indexed.
    """
    source, side, target = dimensions
    widest = max([source + (side or 0), target, *_widths(architecture)])
    # Four blocks of input: one that is read, one that waits, and one that is computed with, from a copy. Two blocks between
    # layers, into one and out of it. Three blocks of results: one that is computed, one that waits, one that is written.
    transformed = block * (4 * (source + (side or 0)) + 2 * widest + 3 * target) * _FLOAT32
    indexed = indexed_rows * (target * _FLOAT32 + _LINKS)
    # The next segment is begun before the last block of the one that makes way for it is written.
    return segments * max(transformed, indexed) + transformed


def free() -> int | None:
    """Bytes that a process may still take: of the machine, or of its control group where that has less; None if unknown."""
    known = [each for each in (_of_machine(), _of_group()) if each is not None]
    return min(known, default=None)


def _widths(architecture: Mapping[str, Any]) -> list[int]:
    layers = architecture.get("layers") or ()
    return [int(architecture.get("hidden") or 0), *(int(layer["width"]) for layer in layers)]


def _of_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None  # not Linux
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _of_group() -> int | None:
    """The page cache counts as used, and is given back when it is asked for: mapped columns are most of it."""
    try:
        limit, used, stat = ((_GROUP / name).read_text() for name in ("memory.max", "memory.current", "memory.stat"))
    except OSError:
        return None
    cached = sum(
        int(line.split()[1]) for line in stat.splitlines() if line.startswith(("active_file", "inactive_file"))
    )
    return max(0, int(limit) - int(used) + cached) if limit.strip().isdecimal() else None
