"""What a process tells native libraries before it imports them: how many threads they have, and what those may keep.

They ask only once. What a thread keeps to be faster next time is of use to nobody else, and a service has many threads.
"""

from __future__ import annotations

import ctypes
import os

_M_ARENA_MAX = -8  # of <malloc.h>


def prepare(threads: int) -> None:
    """Must come before PyTorch and FAISS are imported. What the environment says already is left as it is.

    Args:
        threads: of one computation.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault(
        "MKL_DISABLE_FAST_MM", "1"
    )  # work space is given back, and not kept by each thread (ADR 0031)
    if "MALLOC_ARENA_MAX" not in os.environ:
        _share_arenas(os.cpu_count() or 1)


def _share_arenas(count: int) -> None:
    """Let all threads together have so many of malloc's arenas; each keeps what its worst moment took (ADR 0031)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's: it is the one that has arenas
        libc.mallopt(_M_ARENA_MAX, count)
