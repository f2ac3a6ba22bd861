"""Which format a file is of, and which of its columns is meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from forwardfill.importing import arrow, faiss_index, hdf5, lines, npy, parquet, vecs
from forwardfill.importing.column import BadInput, Column

_READERS: Mapping[str, Callable[[Path], list[Column]]] = {
    "npy": npy.columns,
    "parquet": parquet.columns,
    "arrow": arrow.columns,
    "fvecs": partial(vecs.columns, number="<f4"),
    "bvecs": partial(vecs.columns, number="u1"),
    "hdf5": hdf5.columns,
    "lines": lines.columns,
}
_SUFFIXES = {
    "npy": (".npy",),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".arrows", ".ipc", ".feather"),
    "fvecs": (".fvecs",),
    "bvecs": (".bvecs",),
    "hdf5": (".h5", ".hdf5"),
    "lines": (".txt", ".jsonl", ".ndjson"),
    "faiss": (".faiss", ".index"),
}
FORMATS = tuple(_SUFFIXES)


def columns(path: Path, *, kind: str | None = None, allowed: Path | None = None) -> list[Column]:
    """The columns of a file.

    Args:
        path: of the file.
        kind: one of FORMATS; None goes by the file's suffix.
        allowed: where FAISS indexes may be.

    Raises:
        BadInput: there is no such file, or it is not of its format.
    """
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file")
    kind = kind or next((each for each, suffixes in _SUFFIXES.items() if path.suffix.lower() in suffixes), None)
    if kind is None or (kind != "faiss" and kind not in _READERS):
        suffixes = ", ".join(each for known in _SUFFIXES.values() for each in known)
        raise BadInput(
            f"{path}: of no known format; give it one of the suffixes {suffixes}, or say which it is with --format"
        )
    try:
        return faiss_index.columns(path, allowed) if kind == "faiss" else _READERS[kind](path)
    except BadInput:
        raise
    except Exception as error:  # a damaged file makes the libraries that read it raise anything
        raise BadInput(f"{path}: cannot be read: {error}") from error


def pick(found: Sequence[Column], wanted: str | None, usual: str, *, vectors: bool, path: Path, option: str) -> Column:
    """The column that is meant: the one that is named, or else the usual one, or else the only one that it can be.

    Args:
        found: the columns of a file.
        wanted: a name, or None.
        usual: the name that the service's own Arrow streams use.
        vectors: whether it must hold vectors.
        path: the file.
        option: by which a user names a column.

    Raises:
        BadInput: there is none, or several and no way to tell.
    """
    able = [each for each in found if each.vectors == vectors]
    if wanted is not None:
        able = [each for each in able if each.name == wanted]
    elif len(able) > 1:
        able = [each for each in able if each.name == usual] or able
    if len(able) == 1:
        return able[0]
    if wanted is not None and not any(each.name for each in found):
        raise BadInput(f"{path}: its format has no columns with names; leave {option} out, or name another file")
    what = "vectors" if vectors else "single values"
    there = ", ".join(repr(each.name) for each in found if each.vectors == vectors and each.name) or "none"
    which = f"no column {wanted!r} of {what}" if wanted is not None else f"no single column of {what}"
    raise BadInput(f"{path}: {which}; name one of these with {option}: {there}")
