"""How far an import is: a small file, replaced after every batch that the service acknowledged.

It says which import it is of by a digest of what is imported and where to, so that nobody goes on with other rows in the
middle. Names and times of files are not part of it: a copy of the same bytes is the same source. Of a large file, blocks
spread over the whole are hashed, not all of it, which would be read once more at every start, while a file that was
replaced, cut off or written anew differs in these. What escapes is a few rows changed in place between two blocks, as a careful
person might do; who changes rows starts over, as the message that makes one do it says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from forwardfill.importing.column import BadInput

BLOCK = 1 << 16
BLOCKS = 16


def digest(files: Iterable[Path], options: Mapping[str, object]) -> str:
    """What tells one import from another.

    Args:
        files: that are read, in the order of their parts.
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

    def save(self, rows: int) -> None:
        """Replace the file by one that says so; after a crash it says this or what it said before.

        Raises:
            BadInput: it cannot be written there.
        """
        part = self.path.with_name(self.path.name + ".part")
        try:
            with part.open("wb") as file:
                file.write(orjson.dumps({"import": self.digest, "rows": rows}))
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        except OSError as error:
            raise BadInput(
                f"{self.path}: cannot be written ({error}), so nobody could go on here; name another place with --state"
            ) from error

    def remove(self) -> None:
        """Nothing is left to go on with."""
        self.path.unlink(missing_ok=True)
