"""Items, or pairs to fit, as an Arrow IPC stream. The file is mapped, so a column of fixed size is never copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gallery import errors
from gallery.new_items import NewItems
from gallery.pairs import NewPairs
from service.arrow_sizes import decompressed_bytes
from service.bad_bodies import not_finite
from service.errors import InvalidArrow, named

# What Arrow's own allocator has freed it keeps: after one request of a million vectors half a gigabyte. The C library gives it
# back.
pa.set_memory_pool(pa.system_memory_pool())

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
_REQUIRED = ("id", "embedding")
_COLUMNS = (*_REQUIRED, "side_information", "payload")
_PAIR_COLUMNS = (*_REQUIRED, "label")
_TEXTS = ("id", "payload", "label")


def read_items(path: Path, *, model: str | None, max_items: int, max_bytes: int) -> NewItems:
    """The items of a stream.

    Args:
        path: the stream.
        model: which model embedded them; if null, the schema's metadata says so under the key `model`.
        max_items: rows that a stream may have.
        max_bytes: bytes that it may have in memory, since its buffers may be compressed.

    Raises:
        InvalidArrow: it is not a whole stream, or not of the documented columns.
        LimitExceeded: it has too many rows.
        InvalidItem, InvalidVector, DimensionMismatch: an item cannot be stored; the pointer names it.
    """
    with _legible():
        table = _table(path, _COLUMNS, ("max_items_per_arrow", max_items), max_bytes)
        model = _model(table.schema, model)
        ids = _ids(table, "/items")
        try:
            embeddings = _vectors(_column(table, "embedding"), np.arange(len(table)), "/items/{row}/embedding")
            side, has_side = _side(table)
            return NewItems(model, ids, embeddings, _payloads(table), side, has_side)
        except errors.Invalid as error:
            raise named(error, ids) from error


def read_pairs(path: Path, *, max_pairs: int, max_bytes: int) -> NewPairs:
    """Items that exist, with another model's vectors of them.

    Args:
        path: the stream: `id`, `embedding`, and optionally `label`, strings or integers.
        max_pairs: rows that it may have.
        max_bytes: as for `read_items`.

    Raises:
        InvalidArrow, LimitExceeded, InvalidItem, InvalidVector, DimensionMismatch: as for `read_items`.
    """
    with _legible():
        table = _table(path, _PAIR_COLUMNS, ("max_fit_pairs", max_pairs), max_bytes)
        return NewPairs(
            ids=_ids(table, "/pairs"),
            embeddings=_vectors(_column(table, "embedding"), np.arange(len(table)), "/pairs/{row}/embedding"),
            labels=_labels(table),
        )


@contextmanager
def _legible() -> Iterator[None]:
    """Refuse what Arrow stumbles over, at once or only where it is made an object, as a name that is no text is.

    Raises:
        InvalidArrow: it does.
        OSError: the system refused something, which has a number; the stream may be whole.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InvalidArrow(f"not a whole Arrow IPC stream: {error}") from error


def _ids(table: Any, at: str) -> list[str]:
    ids = _strings(table, "id")
    if any(each is None for each in ids):
        raise errors.InvalidItem("an item needs an id", pointer=f"{at}/{ids.index(None)}/id")
    return [each for each in ids if each is not None]


def _labels(table: Any) -> list[str] | None:
    if "label" not in table.schema.names or table.column("label").null_count == len(table):
        return None
    kind = table.schema.field("label").type
    if not pa.types.is_integer(kind):
        labels = _strings(table, "label")
    else:
        labels = [None if each is None else str(each) for each in _column(table, "label").to_pylist()]
    if any(each is None for each in labels):
        raise errors.InvalidItem("label all pairs, or none", pointer=f"/pairs/{labels.index(None)}/label")
    return [each for each in labels if each is not None]


def _table(path: Path, columns: tuple[str, ...], limit: tuple[str, int], max_bytes: int) -> Any:
    """The stream as one table, of these columns only."""
    name, most = limit
    rows = size = 0
    batches = []
    _check_decompressed(path, max_bytes)
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        _check_columns(stream.schema.names, columns)
        schema = pa.schema([_plain_field(field) for field in stream.schema], stream.schema.metadata)
        for encoded in stream:
            encoded.validate(full=True)  # offsets that point elsewhere must be found before they are used
            # Counted before it is written out: a text that a thousand rows share becomes a thousand texts.
            rows, size = rows + len(encoded), size + sum(map(_written_out, encoded.columns))
            if rows > most:
                raise errors.LimitExceeded(f"a stream may have {most} items ({name})", limit=name, maximum=most)
            if size > max_bytes:
                raise _too_large(max_bytes)
            batches.append(encoded.cast(schema))
        if (rest := source.size() - source.tell()) > 0:  # such as a second stream, whose rows would be left out
            raise InvalidArrow(f"{rest} bytes follow the end of the stream: send one stream in a request")
        return pa.Table.from_batches(batches, schema)


def _check_decompressed(path: Path, max_bytes: int) -> None:
    """Refuse a stream that says it will be too large, before it is decompressed. If it says too little, Arrow refuses it."""
    with pa.memory_map(str(path)) as source:
        if any(size > max_bytes for size in accumulate(decompressed_bytes(source))):
            raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> errors.LimitExceeded:
    return errors.LimitExceeded(
        f"a stream may take {max_bytes} bytes (max_arrow_bytes)", limit="max_arrow_bytes", maximum=max_bytes
    )


def _written_out(column: Any) -> int:
    """The bytes of a column after rows that share a text were each given their own."""
    kind = column.type
    shared = 0
    if pa.types.is_dictionary(kind) and _is_text(kind.value_type):
        shared = pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    elif pa.types.is_string_view(kind) and len(column):
        views = np.frombuffer(column.buffers()[1], "<i4").reshape(-1, 4)[column.offset : column.offset + len(column)]
        lengths = views[:, 0]
        shared = int(lengths[column.is_valid().to_numpy(zero_copy_only=False)].sum(dtype=np.int64))
    return int(column.nbytes) + shared


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _shares(kind: Any) -> bool:
    """Whether rows of such a type may share their contents, so that its size once each has its own is not known."""
    views = (pa.types.is_string_view, pa.types.is_binary_view, pa.types.is_list_view, pa.types.is_large_list_view)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind) or any(is_view(kind) for is_view in views):
        return True
    return any(_shares(kind.field(at).type) for at in range(kind.num_fields))


def _plain_field(field: Any) -> Any:
    """The field with plain text, however its writer encoded it. (A writer that saw only nulls gives the type null.)"""
    kind = field.type
    encoded = pa.types.is_dictionary(kind) and _is_text(kind.value_type)
    if field.name in _TEXTS and (encoded or pa.types.is_string_view(kind) or pa.types.is_null(kind)):
        field = field.with_type(pa.string())
    return field.with_nullable(True)


def _check_columns(names: list[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known or names.count(name) > 1:
            raise InvalidArrow(f"the column {name!r} is not one of {', '.join(known)}, or is there twice")
    for name in _REQUIRED:
        if name not in names:
            raise InvalidArrow(f"the column {name!r} is missing")


def _model(schema: Any, asked: str | None) -> str:
    """By the query parameter or by the stream itself; both may say it, and must say the same."""
    metadata = (schema.metadata or {}).get(b"model")
    named = asked if metadata is None else str(metadata.decode(errors="replace"))
    if named is None:
        raise InvalidArrow(
            "name the model: with the query parameter `model`, or in the schema's metadata under `model`"
        )
    if asked not in (None, named):
        raise InvalidArrow(
            f"the query parameter `model` says {asked}, and the schema's metadata {named}: whose vectors are they?"
        )
    return named


def _column(table: Any, name: str) -> Any:
    return table.column(name).combine_chunks()


def _strings(table: Any, name: str) -> list[str | None]:
    kind = table.schema.field(name).type
    if not _is_text(kind):
        raise InvalidArrow(f"the column {name!r} is of type {kind}; it must be string")
    found: list[str | None] = _column(table, name).to_pylist()
    return found


def _side(table: Any) -> tuple[NDArray[Any] | None, NDArray[np.bool_] | None]:
    """The vectors of the items that have some, and which these are."""
    if "side_information" not in table.schema.names or not len(table):
        return None, None
    column = _column(table, "side_information")
    has_side = column.is_valid().to_numpy(zero_copy_only=False)
    if not has_side.any():
        return None, None
    return _vectors(column.drop_null(), np.flatnonzero(has_side), "/items/{row}/side_information"), has_side


def _vectors(column: Any, items: NDArray[np.intp], pointer: str) -> NDArray[Any]:
    """A list column as (n, dimension); `items` are the items that its rows belong to, `{row}` in the pointer."""
    kind, name = column.type, pointer.rpartition("/")[2]
    fixed = pa.types.is_fixed_size_list(kind) and kind.list_size >= 0  # a stream may say anything
    if not (fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_floating(
        kind.value_type
    ):
        raise InvalidArrow(f"the column {name!r} is of type {kind}; it must be a list of floats, best of a fixed size")
    if column.null_count:
        missing = int(np.argmin(column.is_valid().to_numpy(zero_copy_only=False)))
        raise errors.InvalidVector("an item needs a vector", pointer=pointer.format(row=items[missing]))
    width = kind.list_size if fixed else _width(column, items, pointer)
    numbers = column.flatten()
    if numbers.null_count:
        row = int(np.argmin(numbers.is_valid().to_numpy(zero_copy_only=False))) // width
        raise errors.InvalidVector("a vector has no nulls", pointer=pointer.format(row=items[row]))
    vectors: NDArray[Any] = numbers.to_numpy(zero_copy_only=False).reshape(len(column), width)
    return vectors


def _width(column: Any, items: NDArray[np.intp], pointer: str) -> int:
    """The length of all lists, which must be one."""
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if not len(lengths):
        return 0
    other = np.flatnonzero(lengths != lengths[0])
    if other.size:
        raise errors.DimensionMismatch(
            f"vectors of dimension {lengths[0]} and {lengths[other[0]]}", pointer=pointer.format(row=items[other[0]])
        )
    return int(lengths[0])


def _payloads(table: Any) -> list[Mapping[str, Any] | None]:
    if "payload" not in table.schema.names:
        return [None] * len(table)
    kind = table.schema.field("payload").type
    if pa.types.is_struct(kind):
        if _shares(kind):
            raise InvalidArrow(f"the column 'payload' is of type {kind}; in a struct, write out dictionaries and views")
        return [_plain(value, at) for at, value in enumerate(_column(table, "payload"))]
    return [_parsed(text, at) for at, text in enumerate(_strings(table, "payload"))]


def _plain(struct: Any, at: int) -> Mapping[str, Any] | None:
    """What the struct is in JSON: a date becomes text; bytes, NaN, and moments that Python's dates do not reach are refused."""
    try:
        value = struct.as_py()
        text = None if any(not_finite(value)) else orjson.dumps(value)  # NaN would be written as null
    except (pa.ArrowException, ValueError, OverflowError, TypeError) as error:
        why = str(error).partition(". ")[0]  # behind it is what whoever runs the service might install
        raise errors.InvalidItem(f"a payload is JSON: {why}", pointer=f"/items/{at}/payload") from error
    if text is None:
        raise errors.InvalidItem("a payload is JSON, without NaN and infinity", pointer=f"/items/{at}/payload")
    return _parsed(text, at)


def _parsed(text: str | bytes | None, at: int) -> Mapping[str, Any] | None:
    try:
        payload = None if text is None else orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise errors.InvalidItem(f"a payload is JSON: {error}", pointer=f"/items/{at}/payload") from error
    if payload is not None and not isinstance(payload, dict):
        raise errors.InvalidItem("a payload is a JSON object", pointer=f"/items/{at}/payload")
    return payload
