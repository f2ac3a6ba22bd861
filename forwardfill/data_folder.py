"""What commands that work on the data folder and its catalog start from.

Apart from the commands themselves, so that those that talk to a service, or only tell what there is, do not wait for SQLAlchemy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwardfill import native
from forwardfill.terminal import refuse
from gallery import folder
from gallery.catalog import schema
from gallery.catalog.transaction import Catalog
from gallery.files import Files
from gallery.settings import GallerySettings
from service.ready import make_ready
from service.settings import ServiceSettings

if TYPE_CHECKING:  # it imports FAISS, which must be prepared for
    from gallery.store import Store


def settings() -> GallerySettings:
    """The gallery's settings, after their folder was made."""
    found = GallerySettings()
    try:
        # The vectors, payloads and digests of keys in it are nobody else's. One that is there already stays as its owner made it.
        found.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"FORWARDFILL_DATA: the folder {found.data} cannot be made: {error.strerror}")
    return found


def migrated_catalog() -> Catalog:
    """The catalog, with the schema of this version."""
    migrated = Catalog(settings().database)
    schema.migrate(migrated)
    return migrated


def catalog() -> Catalog:
    """The catalog as it is, if it has the schema of this version."""
    found = Catalog(GallerySettings().database)
    if not schema.is_current(found):
        refuse(
            "The catalog's database is of an older version, or not there; see FORWARDFILL_DATA and `forwardfill migrate`."
        )
    return found


def catalog_and_files() -> tuple[Catalog, Files]:
    """Both as they are: a check for damage must not change anything first."""
    data = GallerySettings().data
    if not data.is_dir():
        refuse(f"FORWARDFILL_DATA: there is no folder {data}")
    return catalog(), Files(data)


def store() -> Store:
    """All that a repair needs. It may transform items, so it needs PyTorch.

    Raises:
        ForeignFolderError: as `folder.check`.
    """
    found, files = catalog_and_files()
    folder.check(found, files)
    found.close()
    native.prepare(GallerySettings().threads_used)
    from service.app import build_store  # noqa: PLC0415 - it imports PyTorch and FAISS

    return build_store(GallerySettings())


def make_service_ready(service: ServiceSettings) -> None:
    """Do once what each of several API processes would have to do as it starts.

    Raises:
        OldSchemaError, NewerSchemaError, UnsafeBinding: as `make_ready`.
        ForeignFolderError: as `folder.claim`.
    """
    gallery = settings()
    opened = Catalog(gallery.database)
    make_ready(opened, service)
    folder.claim(opened, Files(gallery.data))
    opened.close()
