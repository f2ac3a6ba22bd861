"""Parquet: the columns of its top level. Only the column that is asked for is read, and only from the row group on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forwardfill.importing.column import BadInput, Column, is_list_of_numbers, skipping


def columns(path: Path) -> list[Column]:
    """The columns.

    Raises:
        BadInput: it is no Parquet file.
    """
    try:
        with pq.ParquetFile(path) as file:
            rows, schema = file.metadata.num_rows, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path}: not a Parquet file: {error}") from error
    return [
        Column(path, each.name, rows, is_list_of_numbers(each.type), partial(_read, path, each.name)) for each in schema
    ]


def _read(path: Path, name: str, start: int, size: int) -> Iterator[Any]:
    # Buffered ahead, a file of one row group would be read into memory whole.
    with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
        groups, first = list[int](), 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows > start:
                groups.append(group)
            elif not groups:
                first += rows
        batches = file.iter_batches(size, row_groups=groups, columns=[name])
        yield from skipping((batch.column(0) for batch in batches), start - first)
