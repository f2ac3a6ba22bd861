"""Settings of native libraries, which read them once, when they are imported: how many threads, and what these may keep.

Memory that a thread keeps to be faster next time is of no use to other threads, and a service has many.
"""

from __future__ import annotations

import ctypes
import os

_M_ARENA_MAX = -8  # of <malloc.h>


def prepare(threads: int) -> None:
    """Set them, and NumPy's; call it before PyTorch and FAISS are imported. What the environment says already stays as it is.

    Args:
        threads: how many one computation uses.
    """
    # NumPy is there already, and has read them. A thread of its BLAS spins for a tenth of a second after each product.
    if not {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"} & os.environ.keys():
        from threadpoolctl import threadpool_limits  # noqa: PLC0415 - what only asks a service does not wait for it

        threadpool_limits(threads, user_api="blas")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # MKL gives its work space back, in place of keeping some for each thread (ADR 0031).
    os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
    if "MALLOC_ARENA_MAX" not in os.environ:
        _share_arenas(os.cpu_count() or 1)


def _share_arenas(count: int) -> None:
    """Limit malloc to `count` arenas for all threads: each arena keeps the most that it ever held (ADR 0031)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # only glibc has it, and only glibc has arenas
        libc.mallopt(_M_ARENA_MAX, count)
