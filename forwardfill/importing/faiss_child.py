"""The process that reads one FAISS index file: `python -m forwardfill.importing.faiss_child FILE COLUMN START SIZE`.

It writes an Arrow stream of one column, `id` or `embedding`, from a row on. It serves only kinds of index that keep the
vectors as they were added, so what comes out is what went in, and it neither copies nor decodes: the file is mapped.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

#: address space beside twice the file's size, for Python, NumPy, Arrow and FAISS themselves
_ADDRESS_SPACE = 4 << 30
_IVF_FLAT = b"IwFl"

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]


class Kept(Protocol):
    """The rows of an index, in an order that is the same each time."""

    count: int

    def ids(self, start: int, stop: int) -> Ids: ...

    def vectors(self, start: int, stop: int) -> Vectors: ...


class _Flat:
    """Rows in the order in which they were added, which are their ids."""

    def __init__(self, index: Any) -> None:
        self.count = int(index.ntotal)
        self._index = index

    def ids(self, start: int, stop: int) -> Ids:
        return np.arange(start, stop)

    def vectors(self, start: int, stop: int) -> Vectors:
        vectors: Vectors = self._index.reconstruct_n(start, stop - start)
        return vectors


class _Lists:
    """The lists of an IVF-Flat index, one after the other: each holds the ids and the vectors of its rows."""

    def __init__(self, faiss: Any, index: Any) -> None:
        self._faiss, self._lists, self._dimension = faiss, index.invlists, int(index.d)
        sizes = [self._lists.list_size(each) for each in range(index.nlist)]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self.count = int(self._ends[-1]) if sizes else 0

    def ids(self, start: int, stop: int) -> Ids:
        found: Ids = self._gathered(start, stop, lambda each, size: self._view(self._lists.get_ids(each), size))
        return found

    def vectors(self, start: int, stop: int) -> Vectors:
        def read(each: int, size: int) -> Vectors:
            codes = self._view(self._lists.get_codes(each), size * self._dimension * 4)
            vectors: Vectors = codes.view(np.float32).reshape(size, self._dimension)
            return vectors

        found: Vectors = self._gathered(start, stop, read)
        return found

    def _view(self, pointer: Any, count: int) -> Any:
        return self._faiss.rev_swig_ptr(pointer, count)

    def _gathered(self, start: int, stop: int, read: Any) -> Any:
        parts = []
        for each in range(int(np.searchsorted(self._ends, start, "right")), len(self._ends)):
            size = self._lists.list_size(each)
            first = int(self._ends[each]) - size
            if first >= stop:
                break
            if size:
                parts.append(read(each, size)[max(0, start - first) : stop - first])
        return np.concatenate(parts)


class _Renamed:
    """Rows of an index whose ids are places in a list of ids."""

    def __init__(self, faiss: Any, index: Any, inner: Kept) -> None:
        self.count = inner.count
        self._names: Ids = faiss.vector_to_array(index.id_map)
        self._inner = inner

    def ids(self, start: int, stop: int) -> Ids:
        return self._names[self._inner.ids(start, stop)]

    def vectors(self, start: int, stop: int) -> Vectors:
        return self._inner.vectors(start, stop)


def main(path: Path, column: str, start: int, size: int) -> None:
    """Write the stream to what was standard output; whatever FAISS prints goes to standard error."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    faiss: Any = import_module("faiss")
    _limit(faiss, path)
    with path.open("rb") as file:
        ivf = file.read(len(_IVF_FLAT)) == _IVF_FLAT
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if ivf else faiss.IO_FLAG_MMAP_IFC)
    rows = kept(faiss, index)
    kind = pa.int64() if column == "id" else pa.list_(pa.float32(), int(index.d))
    schema = pa.schema([(column, kind)], {"rows": str(rows.count)})
    with pa.ipc.new_stream(out, schema) as writer:
        for at in range(start, rows.count, size):
            stop = min(at + size, rows.count)
            read = rows.ids(at, stop) if column == "id" else rows.vectors(at, stop).ravel()
            array = (
                pa.array(read) if column == "id" else pa.FixedSizeListArray.from_arrays(pa.array(read), int(index.d))
            )
            writer.write_batch(pa.record_batch([array], schema=schema))
    out.close()


def _limit(faiss: Any, path: Path) -> None:
    """Limit memory and loops by the size of the file: fields of a damaged file may ask for any amount, those of a sound one
    never for more than the file has bytes."""
    size = path.stat().st_size
    faiss.set_deserialization_vector_byte_limit(size)
    faiss.set_deserialization_loop_limit(size)
    faiss.set_deserialization_lattice_r2_limit(1)
    resource.setrlimit(resource.RLIMIT_AS, (2 * size + _ADDRESS_SPACE,) * 2)


def kept(faiss: Any, index: Any) -> Kept:
    """The rows of an index that keeps them as they were added; for any other index, end the process."""
    kind = type(index).__name__
    if isinstance(index, faiss.IndexFlat):
        return _Flat(index)
    if isinstance(index, faiss.IndexHNSWFlat):
        return kept(faiss, faiss.downcast_index(index.storage))
    if kind == "IndexIVFFlat":
        lists = faiss.downcast_InvertedLists(index.invlists)
        if getattr(lists, "filename", ""):
            _refuse(
                "its lists are in another file, which may be anywhere; merge them into the index and write it again"
            )
        return _Lists(faiss, index)
    if kind in {"IndexIDMap", "IndexIDMap2"}:
        return _Renamed(faiss, index, kept(faiss, faiss.downcast_index(index.index)))
    return _refuse(
        f"an {kind} does not keep vectors as they were added; import the vectors from where it was built (a flat, IVF-Flat or "
        "HNSW-Flat index, or an IDMap of one, can be imported itself)"
    )


def _refuse(message: str) -> NoReturn:
    sys.exit(message)


if __name__ == "__main__":
    file, column_name, first_row, block_rows = sys.argv[1:]
    try:
        main(Path(file), column_name, int(first_row), int(block_rows))
    except RuntimeError as refused:
        # FAISS's message begins with the function, the file and the line that say it.
        said = re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", " ".join(str(refused).split()))
        sys.exit(f"FAISS cannot read it, so it is cut off, damaged or of another format: {said[:300]}")
    except MemoryError:
        sys.exit("it asks for more memory than a file of its size can need: it is damaged")
