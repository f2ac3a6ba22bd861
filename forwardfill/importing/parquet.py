"""Parquet: the columns of its top level. Only the column that is asked for is read, and only from the row group on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        count = file.num_row_groups
        first, at = _group_of(start, [file.metadata.row_group(group).num_rows for group in range(count)])
        batches = file.iter_batches(size, row_groups=list(range(first, count)), columns=[name])
        yield from skipping((batch.column(0) for batch in batches), start - at)


def _group_of(row: int, groups: Sequence[int]) -> tuple[int, int]:
    """The group that a row is in, by the groups' numbers of rows, and the row that it begins with."""
    at = 0
    for group, rows in enumerate(groups):
        if row < at + rows:
            return group, at
        at += rows
    return len(groups), at
