"""Columns mapped into another space in memory, for queries that are not known in the column's own space.

Only backward routes come here, and only for the query of an older model over items that are native in a newer one: every
row is then a candidate. The mapped columns are kept, within a bound, because a column never changes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from gallery.arrays import Stored
from gallery.index.base import Index
from gallery.index.registry import backend
from gallery.snapshot import Column
from gallery.spaces import EmbeddingModel, Transformation
from gallery.transforms import Transforms

Key = tuple[int, int]


class MappedColumns:
    """A bounded cache of mapped columns; the least recently used go first."""

    def __init__(self, transforms: Transforms, limit_bytes: int) -> None:
        """Keep at most `limit_bytes` of vectors, but always the latest column."""
        self._transforms = transforms
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._indexes: OrderedDict[Key, tuple[Index, int]] = OrderedDict()
        self._bytes = 0

    def index(self, column: Column, by: Transformation, target: EmbeddingModel, side: Stored | None) -> Index:
        """An exact index over the column mapped into the target's space."""
        key = (column.id, by.id)
        with self._lock:
            if key in self._indexes:
                self._indexes.move_to_end(key)
                return self._indexes[key][0]
        # Outside the lock: two threads may map the same column at once, which wastes work but blocks nobody.
        mapped = self._transforms.apply(by, target, column.vectors, side)
        index = backend("flat").open(mapped, space=target.space, path=None, parameters={})
        with self._lock:
            if key not in self._indexes:
                self._indexes[key] = (index, mapped.nbytes)
                self._bytes += mapped.nbytes
            while self._bytes > self._limit and len(self._indexes) > 1:
                _, (_, size) = self._indexes.popitem(last=False)
                self._bytes -= size
        return index
