"""Where facts are kept: rows in the catalog, bytes in files. Handed to everything that writes."""

from __future__ import annotations

from dataclasses import dataclass

from gallery.catalog.transaction import Catalog
from gallery.files import Files
from gallery.settings import GallerySettings
from gallery.transforms import Transforms


@dataclass(frozen=True, slots=True)
class Store:
    """One per process."""

    catalog: Catalog
    files: Files
    transforms: Transforms
    settings: GallerySettings


def columns_folder(gallery_id: int) -> str:
    """Where a gallery's columns, ids and side-information are."""
    return f"columns/{gallery_id}"


def indexes_folder(gallery_id: int) -> str:
    """Where a gallery's index files are."""
    return f"indexes/{gallery_id}"
