"""Probes from files: queries of each model by which an upgrade is judged, and which ids each of them ought to find."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import orjson

from forwardfill.wire import loaded, matrix


def vectors(files: Mapping[str, Path]) -> dict[str, npt.NDArray[Any]]:
    """The queries by model, from an `.npy` file of shape (n, dimension) for each: row by row the same n queries.

    Raises:
        ValueError: a file is no such array, or they have different numbers of rows.
        OSError: one cannot be read.
    """
    found = {model: matrix(loaded(path), str(path)) for model, path in files.items()}
    if len({len(each) for each in found.values()}) > 1:
        counts = ", ".join(f"{files[model]} has {len(each)}" for model, each in found.items())
        raise ValueError(f"each model embeds the same queries, but {counts}")
    return found


def relevant(path: Path, count: int) -> list[list[str]]:
    """The ids that each of so many queries ought to find: JSON lines, a list of ids for each query.

    Raises:
        ValueError: they are not.
        OSError: the file cannot be read.
    """
    lines = path.read_bytes().removeprefix(BOM_UTF8).splitlines()
    if len(lines) != count:
        raise ValueError(f"{path} has {len(lines)} lines for {count} queries")
    return [_ids(path, number, line) for number, line in enumerate(lines, 1)]


def _ids(path: Path, number: int, line: bytes) -> list[str]:
    try:
        ids = orjson.loads(line)
    except orjson.JSONDecodeError:
        ids = None
    if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids):
        raise ValueError(f'{path}, line {number}: should be a JSON list of ids, such as ["img-1", "img-7"]')
    return ids
