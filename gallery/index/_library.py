"""FAISS without its type stubs, which know neither selectors nor the search parameters of HNSW."""

from __future__ import annotations

from importlib import import_module
from typing import Any

faiss: Any = import_module("faiss")
