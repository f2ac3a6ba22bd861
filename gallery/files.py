"""Files that appear whole or not at all: write beside, sync, rename, sync the folder.

A crash leaves at most a file whose name ends in `.part`, or a whole file that no row of the catalog names. Both are
reclaimed by `gallery.orphans`, which spares what is young because it may be about to be published.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ulid import ULID

from gallery import errors, faults

PART = ".part"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Written:
    """A file that is durable, and what the catalog records of it."""

    #: name relative to the data folder
    name: str
    #: SHA-256 of the whole file, header included
    sha256: str
    #: size on disk
    bytes: int


class Files:
    """One folder, addressed by relative names that only the server makes."""

    #: folders in which files were renamed, where these are synced later
    _to_sync: set[Path] | None = None

    def __init__(self, root: Path) -> None:
        """Use `root`, which is made if it does not exist."""
        root.mkdir(parents=True, exist_ok=True)
        self.root = root.resolve()  # it may be reached by a symbolic link

    def path(self, name: str) -> Path:
        """The absolute path of a stored name, which must stay inside the root."""
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root):
            raise errors.Damaged(f"the stored name {name!r} leads out of the data folder")
        return path

    def new(self, folder: str, suffix: str) -> str:
        """A name that nothing had before."""
        return f"{folder}/{ULID()}{suffix}"

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Give a path to write to; when the block ends well, the file is durable under `name`.

        Whoever writes to the path need not sync. On an error nothing is left.
        """
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + PART)
        try:
            yield part
            faults.reached("sync")
            with part.open("rb+") as handle:
                os.fsync(handle.fileno())
            part.rename(path)
            faults.reached("rename")
            if self._to_sync is None:
                sync_folder(path.parent)
            else:
                self._to_sync.add(path.parent)
        except OSError as error:
            if error.errno in _FULL and error.filename is None:  # a handle does not say what it writes
                error.filename = name
            raise
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def batch(self) -> Iterator[Files]:
        """The same files; what is written to them is durable only when the block ends well.

        One sync of a folder makes every rename in it durable, and costs a small write as much as the sync of a file.
        """
        files = copy(self)
        files._to_sync = set()
        yield files
        for folder in sorted(files._to_sync):
            sync_folder(folder)

    def remove(self, names: Iterable[str]) -> None:
        """Forget files. Readers that have them mapped keep their bytes until they let go."""
        for name in names:
            self.path(name).unlink(missing_ok=True)

    @contextmanager
    def unnamed(self, names: Iterable[str]) -> Iterator[None]:
        """Remove files if the block, which was to name them, fails; else make sure that they are there for the commit.

        It goes inside the transaction, not around it: a commit that fails may still have happened, as when the connection
        broke before its answer came, and then these files are all there is of what was written. `gallery.orphans` knows better.

        A process that was suspended between writing and naming may find that its files were taken for orphans; so they
        become young again right before the commit, or there is none.

        Raises:
            Damaged: a file is gone.
        """
        claimed = list(names)
        faults.reached("written")
        try:
            yield
            self.claim(claimed)
        except BaseException:
            self.remove(claimed)
            raise

    def claim(self, names: Iterable[str]) -> None:
        """Make files young again that a transaction is about to name.

        Raises:
            Damaged: one was removed as an orphan already.
        """
        for name in names:
            try:
                os.utime(self.path(name))
            except FileNotFoundError as error:
                raise errors.Damaged(
                    f"{name} waited so long to be named that it was removed as an orphan", file=name
                ) from error

    def old(self, folder: str, *, older_than: float) -> Iterator[str]:
        """The files under `folder` that were not touched for `older_than` seconds."""
        start = self.path(folder)
        for path in sorted(start.rglob("*")) if start.exists() else ():
            name = path.relative_to(self.root).as_posix()
            if self._is_old(name, older_than):
                yield name

    def remove_unknown(self, names: Iterable[str], *, known: Callable[[str], bool], older_than: float) -> list[str]:
        """Remove of these what is old and unknown, each right after it was asked about.

        Returns:
            The names that were removed.
        """
        removed = []
        for name in names:
            if self._is_old(name, older_than) and not known(name):
                self.path(name).unlink(missing_ok=True)
                removed.append(name)
        return removed

    def _is_old(self, name: str, older_than: float) -> bool:
        path = self.path(name)
        try:
            return path.is_file() and path.stat().st_mtime < time.time() - older_than
        except FileNotFoundError:
            return False


class Digested:
    """A file that is written once from its start to its end, and the digest of what was written, taken on the way.

    It is the digest of what the file should hold. Reading the file again for it would take as long as writing it did, and would
    vouch for whatever is there by then, even if that is not what was written.
    """

    def __init__(self, handle: IO[bytes]) -> None:
        """Write to `handle`, at whose start nothing is yet."""
        self._handle = handle
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes behind those before; returns how many."""
        self._sha256.update(data)
        count = self._handle.write(data)
        self._bytes += count
        return count

    def as_written(self, name: str) -> Written:
        """What the catalog should record of the file, once it is durable under `name`."""
        return Written(name=name, sha256=self._sha256.hexdigest(), bytes=self._bytes)


def written(files: Files, name: str) -> Written:
    """What the catalog should record of a file that is there."""
    path = files.path(name)
    return Written(name=name, sha256=digest(path), bytes=path.stat().st_size)


def adopt(files: Files, path: Path, name: str, sha256: str) -> None:
    """Make a file durable under a name that its digest decides, so that whoever comes first wrote the same bytes.

    Args:
        files: where it will be.
        path: where it is, in the same file system.
        name: what it will be called.
        sha256: its digest.
    """
    stored = files.path(name)
    if stored.exists() and digest(stored) == sha256:
        return
    try:
        with files.writing(name) as part:
            path.rename(part)
    except FileNotFoundError:
        # Another process brought the same bytes, took the unfinished file's name, and finished it.
        if not stored.exists():
            raise


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
