"""Arrow IPC, mapped: the file format (which Feather is too) and the stream format."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from forwardfill.importing.column import BadInput, Column, is_list_of_numbers, skipping

_FILE_MAGIC = b"ARROW1"


def columns(path: Path) -> list[Column]:
    """The columns.

    Raises:
        BadInput: it is neither of the two formats.
    """
    try:
        with path.open("rb") as file:
            is_file = file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        with pa.memory_map(str(path)) as source, _opened(source, is_file) as reader:
            schema = reader.schema
        rows = sum(len(array) for array in _arrays(path, is_file, 0)) if len(schema) else 0
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path}: not an Arrow IPC file or stream: {error}") from error
    return [
        Column(path, each.name, rows, is_list_of_numbers(each.type), partial(_read, path, is_file, at))
        for at, each in enumerate(schema)
    ]


def _read(path: Path, is_file: bool, column: int, start: int, _: int) -> Iterator[Any]:
    return skipping(_arrays(path, is_file, column), start)


def _arrays(path: Path, is_file: bool, column: int) -> Iterator[Any]:
    """One column, batch by batch.

    Raises:
        BadInput: a stream ends before its file does, as where several were written one after the other.
    """
    with pa.memory_map(str(path)) as source, _opened(source, is_file, column) as reader:
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            yield batch.column(0)
        if not is_file and (rest := source.size() - source.tell()) > 0:  # its rows would be left out
            raise BadInput(
                f"{path}: {rest} bytes follow the end of its Arrow stream: import each stream from its own file"
            )


def _opened(source: Any, is_file: bool, *columns: int) -> Any:
    """A reader of some columns, or of all if none is named; the others are not even decompressed."""
    options = pa.ipc.IpcReadOptions(included_fields=list(columns))
    return pa.ipc.open_file(source, options=options) if is_file else pa.ipc.open_stream(source, options=options)
