"""The rows of an import: columns side by side, with those checks for which the service could not name the row of the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from forwardfill.importing.column import BadInput, Column

_SAMPLE = 100


@dataclass(frozen=True, slots=True)
class Rows:
    """What is imported, and the model that made it."""

    embeddings: Column
    dimension: int
    #: None counts the rows
    ids: Column | None = None
    id_prefix: str = ""
    side: Column | None = None
    side_dimension: int | None = None
    payloads: Column | None = None

    def __post_init__(self) -> None:
        """Refuse columns that do not belong together."""
        if not self.embeddings.rows:
            raise BadInput(f"{self.embeddings.where}: has no rows")
        for column in (self.ids, self.side, self.payloads):
            if column is not None and column.rows != self.embeddings.rows:
                raise BadInput(
                    f"{column.where} has {column.rows} rows, but {self.embeddings.where} has {self.embeddings.rows}: row by "
                    "row they must be of the same items"
                )
        if self.side is not None and self.side_dimension is None:
            raise BadInput(f"{self.side.where}: the model was registered without side-information; leave it out")

    def __len__(self) -> int:
        return self.embeddings.rows

    def columns(self) -> dict[str, Column]:
        """The columns that are read, by the names that the service has for them."""
        named = {"id": self.ids, "embedding": self.embeddings, "side_information": self.side, "payload": self.payloads}
        return {name: column for name, column in named.items() if column is not None}

    def row_bytes(self) -> int:
        """About how many bytes a row has in a request; for ids and payloads, those of the first rows are taken."""
        floats = self.dimension + (self.side_dimension or 0 if self.side else 0)
        beside = 16 + len(self.id_prefix.encode())
        if self.ids is not None:
            first = texts(next(self.ids.blocks(0, _SAMPLE)), "", self.ids, 0)
            beside += first.nbytes // len(first)
        if self.payloads is not None:
            first = payload(next(self.payloads.blocks(0, _SAMPLE)), self.payloads)
            beside += first.nbytes // len(first)
        return 4 * floats + beside

    def batches(self, start: int, size: int) -> Iterator[Any]:
        """Record batches of `size` rows from row `start` on, as the service takes them; the last may be shorter.

        Raises:
            BadInput: a row cannot be imported.
        """
        columns = self.columns()
        for blocks in zip(*(column.blocks(start, size) for column in columns.values()), strict=True):
            given = dict(zip(columns, blocks, strict=True))
            yield pa.record_batch(self._checked(given, start))
            start += len(blocks[0])

    def id_blocks(self, size: int) -> Iterator[list[str]]:
        """The ids as they are imported, in blocks."""
        if self.ids is None:
            return
        at = 0
        for block in self.ids.blocks(0, size):
            yield texts(block, self.id_prefix, self.ids, at).to_pylist()
            at += len(block)

    def _checked(self, blocks: dict[str, Any], start: int) -> dict[str, Any]:
        found = {
            "id": self._ids(blocks.get("id"), start, len(blocks["embedding"])),
            "embedding": vectors(blocks["embedding"], self.dimension, self.embeddings, start, required=True),
        }
        if self.side is not None and self.side_dimension is not None:
            side = blocks["side_information"]
            found["side_information"] = vectors(side, self.side_dimension, self.side, start, required=False)
        if self.payloads is not None:
            found["payload"] = payload(blocks["payload"], self.payloads)
        return found

    def _ids(self, block: Any, start: int, count: int) -> Any:
        if self.ids is None:
            return pa.array([f"{self.id_prefix}{row}" for row in range(start, start + count)])
        return texts(block, self.id_prefix, self.ids, start)


def texts(array: Any, prefix: str, column: Column, start: int) -> Any:
    """Ids as strings.

    Args:
        array: strings, integers or bytes.
        prefix: to put before each.
        column: where it is from.
        start: the row in which it begins.

    Raises:
        BadInput: they are of another type, or one is missing or not UTF-8.
    """
    kind = _plain(array.type)
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_binary(kind)):
        raise BadInput(f"{column.where}: ids are strings or integers, not {kind}; name another column with --id-column")
    if pa.types.is_binary(kind):
        ids = pa.array([_decoded(each, column, row) for row, each in enumerate(array.to_pylist(), start)], pa.string())
    else:
        ids = _strings(array)
    if ids.null_count:
        row = start + int(np.argmin(ids.is_valid().to_numpy(zero_copy_only=False)))
        raise BadInput(f"{column.where}, row {row}: has no id; give it one, or leave ids out to count the rows")
    return pa.array([prefix + each for each in ids.to_pylist()]) if prefix else ids


def vectors(array: Any, dimension: int, column: Column, start: int, *, required: bool) -> Any:
    """Vectors as lists of float32 of one length.

    Args:
        array: lists of numbers.
        dimension: which all must have.
        column: where it is from.
        start: the row in which it begins.
        required: whether a row may have none.

    Raises:
        BadInput: a row has another dimension, no vector where it needs one, or a number that is not finite.
    """
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    if required and not valid.all():
        raise BadInput(f"{column.where}, row {start + int(np.argmin(valid))}: has no vector; every row needs one")
    rows = start + np.flatnonzero(valid)
    there = array.drop_null() if array.null_count else array  # drop_null copies, even where nothing is null
    lengths = there.value_lengths().to_numpy(zero_copy_only=False)
    other = np.flatnonzero(lengths != dimension)
    if len(other):
        raise BadInput(
            f"{column.where}, row {rows[other[0]]}: has dimension {lengths[other[0]]}, the model {dimension}; name the model "
            "that made these vectors, or another column"
        )
    kind = pa.list_(pa.float32(), dimension)
    if not len(there):  # the cast would read the numbers of nulls, which an Arrow file need not have
        return pa.nulls(len(array), kind)
    # Numbers beyond float32 become infinity here, and are found below.
    typed = array.cast(kind, safe=False)
    # `flatten` leaves out the rows that have no vector.
    numbers = typed.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), dimension)
    bad = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
    if len(bad):
        raise BadInput(
            f"{column.where}, row {rows[bad[0]]}: holds NaN, infinity, a null or a number beyond float32; mend the row or leave "
            "it out"
        )
    return typed


def payload(array: Any, column: Column) -> Any:
    """Payloads as structs or JSON text, as the service takes them; it parses them."""
    if pa.types.is_struct(array.type):
        return array
    kind = _plain(array.type)
    if not _is_text(kind):
        raise BadInput(f"{column.where}: a payload is JSON text or a struct, not {kind}; name another column")
    return _strings(array)


def _plain(kind: Any) -> Any:
    """The type of the values themselves, also in a dictionary array."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _strings(array: Any) -> Any:
    """Strings or integers as strings, also from a dictionary array."""
    if pa.types.is_dictionary(array.type):  # a dictionary of views cannot be cast as a whole
        return array.dictionary.cast(pa.string()).take(array.indices)
    return array.cast(pa.string())


def _decoded(value: bytes | None, column: Column, row: int) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{column.where}, row {row}: its id is not text in UTF-8 ({error}); give it one that is"
        ) from error
