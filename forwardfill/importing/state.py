"""How far an import is: a small file, replaced after every batch that the service acknowledged.

A digest in it says which import it is of: what is imported, and where to, so that nobody goes on in the middle with other rows.
Names and times of files do not count: a copy of the same bytes is the same source. Of a large file only some blocks, spread over
all of it, are hashed, because the whole would have to be read again at every start. A file that was replaced, cut off or written
anew differs in these blocks. A few rows that were changed in place between two blocks are not noticed; whoever does that has to
start over, as the message for a refused row says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from forwardfill.importing.column import BadInput

BLOCK = 1 << 16
BLOCKS = 16


def digest(files: Iterable[Path], options: Mapping[str, object]) -> str:
    """The digest of an import.

    Args:
        files: the files that are read, in the order of their columns.
        options: whatever else decides which rows are sent, and where to.
    """
    hashed = hashlib.sha256(orjson.dumps(options, option=orjson.OPT_SORT_KEYS))
    for path in files:
        size = path.stat().st_size
        hashed.update(f"\n{size}\n".encode())
        with path.open("rb") as file:
            for at in sorted({max(0, size - BLOCK) * each // (BLOCKS - 1) for each in range(BLOCKS)}):
                file.seek(at)
                hashed.update(file.read(BLOCK))
    return hashed.hexdigest()


@dataclass(frozen=True, slots=True)
class State:
    """The state file of one import."""

    path: Path
    digest: str

    def rows(self) -> int:
        """How many rows are acknowledged; 0 where there is no file.

        Raises:
            BadInput: the file is of another import.
        """
        try:
            found = orjson.loads(self.path.read_bytes())
            of, rows = found["import"], int(found["rows"])
        except FileNotFoundError:
            return 0
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            of, rows = None, 0
        if of != self.digest:
            raise BadInput(
                f"{self.path}: is of another import: the files, the options or the gallery were others. Remove it to import all "
                "rows from the first on; rows that are stored already are only replaced by themselves"
            )
        return rows

    def check(self) -> None:
        """Write what `save` would, and take it away again.

        Raises:
            BadInput: it cannot be written there.
        """
        with self._written(0) as part:
            part.unlink()

    def save(self, rows: int) -> None:
        """Replace the file by one with this number; after a crash it has this or the previous one.

        Raises:
            BadInput: it cannot be written there.
        """
        with self._written(rows) as part:
            part.replace(self.path)

    @contextmanager
    def _written(self, rows: int) -> Iterator[Path]:
        """A file beside the state's, with this number."""
        part = self.path.with_name(self.path.name + ".part")
        try:
            with part.open("wb") as file:
                file.write(orjson.dumps({"import": self.digest, "rows": rows}))
                file.flush()
                os.fsync(file.fileno())
            yield part
        except OSError as error:
            raise BadInput(
                f"{self.path}: cannot be written ({error}), so nobody could go on here; name another place with --state"
            ) from error

    def remove(self) -> None:
        """Remove the file: everything is imported."""
        self.path.unlink(missing_ok=True)
