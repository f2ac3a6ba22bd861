"""A process that dies at a chosen moment: `kill -9`, or an exception that unwinds (SIGTERM, a connection that breaks).

A `Bomb` counts the moments that a process passes: each file that is begun, torn, whole or removed, each transaction that is
begun, about to commit, committed. At the chosen one it goes off. A killed process does nothing more, so every later call fails
too and no cleaning up happens; an interrupted one unwinds through its `except` and `finally` blocks.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from gallery import orphans
from gallery.catalog.galleries import files_of
from gallery.catalog.tables import GalleryRow, UpgradeRow, UpgradeSegmentRow
from gallery.catalog.transaction import Catalog, Transaction
from gallery.files import Files
from tests.gallery.world import World


class Killed(BaseException):
    """The process is gone; or it was asked to go, and unwinds."""


class Bomb:
    """Goes off at the `at`-th moment; never, if there are fewer."""

    def __init__(self, at: int, *, unwinds: bool = False) -> None:
        """Choose the moment.

        Args:
            at: counted from 0.
            unwinds: whether the process cleans up behind itself.
        """
        self.at = at
        self.unwinds = unwinds
        self.passed: list[str] = []
        self.commits = 0
        self.went_off = False

    def moment(self, name: str) -> None:
        """Pass a moment."""
        self.alive()
        self.passed.append(name)
        if len(self.passed) == self.at + 1:
            self.went_off = True
            raise Killed(name)

    def alive(self) -> None:
        """A dead process does nothing."""
        if self.went_off and not self.unwinds:
            raise Killed("dead")

    def committed(self) -> None:
        """A transaction is durable."""
        self.commits += 1
        self.moment("committed")


class MortalFiles(Files):
    """Files of a process with a bomb."""

    def __init__(self, bomb: Bomb, root: Path) -> None:
        super().__init__(root)
        self.bomb = bomb

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Die before the file, with half of it written, or with the whole of it named by nothing."""
        self.bomb.moment("a file begins")
        torn: tuple[Path, bytes] | None = None
        try:
            with super().writing(name) as part:
                yield part
                torn = part, part.read_bytes()
                self.bomb.moment("a file is torn")
        except Killed:
            if torn is not None and not self.bomb.unwinds:
                torn[0].write_bytes(torn[1][: len(torn[1]) // 2])  # nobody was left to remove it
            raise
        self.bomb.moment("a file is whole")

    def remove(self, names: Iterable[str]) -> None:
        """Die before each removal."""
        for name in names:
            self.bomb.moment("a file is removed")
            super().remove([name])


class MortalCatalog(Catalog):
    """The catalog of a process with a bomb."""

    def __init__(self, bomb: Bomb, url: str) -> None:
        super().__init__(url)
        self.bomb = bomb

    @contextmanager
    def transaction(self, name: str = "") -> Iterator[Transaction]:
        """Die before it, before the commit, or right after."""
        self.bomb.moment("a transaction begins")
        with super().transaction(name) as tx:
            yield tx
            self.bomb.moment("a transaction is about to commit")
            tx.after.insert(0, self.bomb.committed)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """The dead do not read."""
        self.bomb.alive()
        with super().reading() as session:
            yield session


class Stage:
    """One data folder whose contents come and go, and processes over it.

    SQLAlchemy compiles each statement once per engine, which takes longer than to run it: so each kind of process keeps its
    engine, without its connections.
    """

    def __init__(self, folder: Path) -> None:
        """Play in a folder below this one."""
        self.folder = folder / "data"
        url = f"sqlite:///{self.folder / 'catalog.sqlite3'}"
        self._mortal = MortalCatalog(Bomb(-1), url)
        self._catalogs = {"main": Catalog(url), "other": Catalog(url)}

    def set(self, template: Path) -> None:
        """Begin with a copy of another data folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(template, self.folder)

    def open(self, process: str = "main", **settings: Any) -> World:
        """A process that starts."""
        return World.open(self.folder, catalog=lambda _: self._catalogs[process], **settings)

    def mortal(self, bomb: Bomb, **settings: Any) -> World:
        """A process with a bomb."""
        self._mortal.bomb = bomb
        return World.open(self.folder, files=partial(MortalFiles, bomb), catalog=lambda _: self._mortal, **settings)

    def close(self) -> None:
        """Close all connections."""
        for catalog in (self._mortal, *self._catalogs.values()):
            catalog.close()


def leases_run_out(catalog: Catalog, of: str = "mortal") -> None:
    """What the dead held of upgrades may be taken over."""
    with catalog.transaction() as tx:
        for row in (UpgradeRow, UpgradeSegmentRow):
            ended = update(row).where(row.owner == of).values(leased_until=datetime(2000, 1, 1, tzinfo=UTC))
            tx.session.execute(ended)


def stored_files(folder: Path) -> set[str]:
    """What lies in the data folder besides the catalog and artifacts."""
    return {
        path.relative_to(folder).as_posix()
        for below in ("columns", "indexes")
        for path in (folder / below).rglob("*")
        if path.is_file()
    }


def named_files(world: World) -> set[str]:
    """What the catalog names."""
    with world.store.catalog.reading() as session:
        return {name for gallery in session.scalars(select(GalleryRow.id)) for name in files_of(session, gallery)}


def sweep(world: World) -> set[str]:
    """Reclaim what no row names, however young; returns it."""
    return {
        name
        for folder in ("columns", "indexes")
        for name in orphans.remove(world.store.catalog, world.store.files, folder, older_than=-60)
    }
