"""Text in UTF-8, a row per line: ids as they are, or payloads as JSON. An empty line is a row that has none."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from forwardfill.importing.column import BadInput, Column

#: with or without the mark that some programs put before the first line; it is no part of that row
_ENCODING = "utf-8-sig"


def columns(path: Path) -> list[Column]:
    """The lines.

    Raises:
        BadInput: it is not text in UTF-8.
    """
    try:
        with path.open(encoding=_ENCODING) as file:
            rows = sum(1 for _ in file)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not text in UTF-8: {error}; convert it, or name its format with --format") from error
    return [Column(path, "", rows, False, partial(_read, path))]


def _read(path: Path, start: int, size: int) -> Iterator[Any]:
    with path.open(encoding=_ENCODING) as file:
        lines = islice(file, start, None)
        while block := [line.rstrip("\n") or None for line in islice(lines, size)]:
            yield pa.array(block, pa.string())
