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


def made() -> GallerySettings:
    """The gallery's settings, after their folder was made."""
    settings = GallerySettings()
    try:
        settings.data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"FORWARDFILL_DATA: the folder {settings.data} cannot be made: {error.strerror}")
    return settings


def migrated() -> Catalog:
    """The catalog, with the schema of this version."""
    catalog = Catalog(made().database)
    schema.migrate(catalog)
    return catalog


def present() -> Catalog:
    """The catalog, where there is one of this version: nothing is made or migrated."""
    catalog = Catalog(GallerySettings().database)
    if not schema.is_current(catalog):
        refuse(
            "The catalog's database is of an older version, or not there; see FORWARDFILL_DATA and `forwardfill migrate`."
        )
    return catalog


def current() -> tuple[Catalog, Files]:
    """Catalog and files, as they are: a check for damage must not change anything first."""
    settings = GallerySettings()
    if not settings.data.is_dir():
        refuse(f"FORWARDFILL_DATA: there is no folder {settings.data}")
    return present(), Files(settings.data)


def store() -> Store:
    """All that a repair needs. It may transform items, so it needs PyTorch.

    Raises:
        ForeignFolderError: as `folder.check`.
    """
    catalog, files = current()
    folder.check(catalog, files)
    catalog.close()
    settings = GallerySettings()
    native.prepare(settings.threads_used)
    from service.app import build_store  # noqa: PLC0415 - it imports PyTorch and FAISS

    return build_store(settings)


def make_service_ready(settings: ServiceSettings) -> None:
    """Do once what each of several API processes would have to do as it starts.

    Raises:
        OldSchemaError, NewerSchemaError, UnsafeBinding: as `make_ready`.
        ForeignFolderError: as `folder.claim`.
    """
    gallery = made()
    catalog = Catalog(gallery.database)
    make_ready(catalog, settings)
    folder.claim(catalog, Files(gallery.data))
    catalog.close()
