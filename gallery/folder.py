"""Whether a catalog and a data folder belong together.

Each has a setting of its own, so a process may be given two that do not belong together, and a disk may not be mounted. In
another catalog's folder, every file would look like one that nothing needs, and would be removed. In an empty folder, every file
would look lost: `gallery.repair` would make what it can anew, and all of it would be gone when the disk is back. So a file in
the folder holds its catalog's identity.
"""

from __future__ import annotations

import math

from sqlalchemy.orm import Session
from ulid import ULID

from gallery.catalog.galleries import identity, known_files, names_files
from gallery.catalog.transaction import Catalog
from gallery.files import PART, Files, sync_folder
from gallery.orphans import FOLDERS

NAME = "catalog.id"


class ForeignFolderError(Exception):
    """The data folder is not this catalog's."""


def check(catalog: Catalog, files: Files) -> str:
    """Make sure that the folder is the catalog's; returns the catalog's identity.

    Raises:
        ForeignFolderError: it bears another one; or it bears none, and holds other files than the catalog names.
    """
    mark = files.path(NAME)
    with catalog.reading() as session:
        own = identity(session)
        borne = mark.read_text().strip() if mark.exists() else own if _agree(session, files) else ""
    if borne != own:
        why = "belongs to another catalog" if borne else "holds none of the files that this catalog names"
        raise ForeignFolderError(
            f"FORWARDFILL_DATA, FORWARDFILL_DATABASE_URL: the folder {files.root} {why}: is it mounted, and are both right? "
            f"If they belong together all the same, write {own} into {mark}"
        )
    return own


def claim(catalog: Catalog, files: Files) -> None:
    """As `check`, and from then on the folder bears the identity.

    Raises:
        ForeignFolderError: as `check`.
    """
    own, mark = check(catalog, files), files.path(NAME)
    if not mark.exists():
        name = f"{NAME}-{ULID()}"  # others may start at the same moment
        with files.writing(name) as part:
            part.write_text(f"{own}\n")
        files.path(name).rename(mark)
        sync_folder(files.root)


def _agree(session: Session, files: Files) -> bool:
    """Whether a file is there that the catalog names; or none is there, and it names none."""
    others = False
    for folder in FOLDERS:
        known = known_files(session, folder)
        for name in files.old(folder, older_than=-math.inf):
            if known(name):
                return True
            others = others or not name.endswith(PART)
    return not others and not names_files(session)
