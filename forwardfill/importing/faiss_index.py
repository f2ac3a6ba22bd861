"""A FAISS index file, read in a child process.

FAISS's reader is native code that was not written for hostile files: one that is damaged may crash the process that reads
it, or worse. So only files in a folder that the operator named are read, by a child that has no key, and what it answers
is an Arrow stream that is checked like any other.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from forwardfill.importing.column import BadInput, Column


def columns(path: Path, allowed: Path | None) -> list[Column]:
    """The columns `id` and `embedding`.

    Args:
        path: of the index.
        allowed: the folder that index files may be in, at any depth, after symbolic links are followed.

    Raises:
        BadInput: it is elsewhere, or no index that keeps its vectors.
    """
    _check_place(path, allowed)
    path = path.resolve()  # so that the file that is read is the one that was checked, even if a link changes
    with _child(path, "id", sys.maxsize, 1) as stream:  # beyond its last row, so just the schema
        rows = int(stream.schema.metadata[b"rows"])
        stream.read_all()
    return [Column(path, name, rows, name == "embedding", partial(_read, path, name)) for name in ("id", "embedding")]


def _check_place(path: Path, allowed: Path | None) -> None:
    mend = f"name the folder with --allow-folder {path.resolve().parent} if you trust what is in it"
    if allowed is None:
        raise BadInput(f"{path}: FAISS indexes are read only from a folder that is allowed; {mend}")
    if not path.resolve().is_relative_to(allowed.resolve()):
        raise BadInput(f"{path}: is not in the allowed folder {allowed}; move it there, or {mend}")


def _read(path: Path, name: str, start: int, size: int) -> Iterator[Any]:
    with _child(path, name, start, size) as stream:
        for batch in stream:
            batch.validate(full=True)
            yield batch.column(0)


@contextmanager
def _child(path: Path, name: str, start: int, size: int) -> Iterator[Any]:
    """The Arrow stream of a child, to be read to its end.

    Raises:
        BadInput: the child refused the file, or died of it.
    """
    words = [sys.executable, "-m", "forwardfill.importing.faiss_child", str(path), name, str(start), str(size)]
    ours = {key: value for key, value in os.environ.items() if not key.startswith("FORWARDFILL_")}  # not the API key
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each takes address space, which the child limits
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(  # noqa: S603 - our own module, and the path as one word
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, env=ours | threads
        ) as child,
    ):
        try:
            with pa.ipc.open_stream(child.stdout) as stream:
                yield stream
            # A child that dies between two batches leaves a stream that looks whole.
            if child.wait():
                raise BadInput(_why(path, child.returncode, said))
        except pa.ArrowException as error:
            raise BadInput(_why(path, child.wait(), said)) from error
        finally:
            child.kill()


def _why(path: Path, code: int, said: IO[bytes]) -> str:
    """Why a child failed: its last line, or the signal that ended it."""
    if code < 0:
        return f"{path}: FAISS died of it ({signal.Signals(-code).name}); it is damaged, or no index file"
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return f"{path}: {lines[-1] if lines else f'FAISS ended with {code} and answered nothing that can be read'}"
