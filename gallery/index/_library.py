"""FAISS without its type stubs, which know neither selectors nor the search parameters of HNSW."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

#: the commands that give an environment a FAISS that can use a GPU
WITH_GPU = "`pip uninstall --yes faiss-cpu faiss-gpu-cu12`, then `pip install faiss-gpu-cu12`"

try:
    faiss: Any = import_module("faiss")
except AttributeError as error:  # its Python files and its C++ library come from different packages
    raise ImportError(
        "faiss-cpu and faiss-gpu-cu12 are both installed, which make one module that cannot be imported: `pip uninstall --yes "
        f"faiss-cpu faiss-gpu-cu12`, then `pip install faiss-cpu`; or, for indexes on a GPU, {WITH_GPU}"
    ) from error

# FAISS compares many queries by a matrix product and few one by one, and draws the line where queries x dimension is
# 128,000, at a thousand queries of 128 numbers. Here the product is twice as fast at 8 queries and 6 times at 64. Because
# it rounds differently, nobody gets it unasked: a selector makes FAISS compare one by one, even one that selects all rows.
# (Before 1.15 the line is drawn by the queries alone, at 20.)
faiss.cvar.distance_compute_blas_threshold = min(1024, faiss.cvar.distance_compute_blas_threshold)
ONE_BY_ONE: Any = faiss.IDSelectorAll()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let FAISS work with one thread, whatever the calling thread is allowed; OpenMP keeps that number for each thread."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
