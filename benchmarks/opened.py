"""A data folder opened in this process, as an API process has it in memory: searches without HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import faiss

from gallery.catalog.transaction import Catalog
from gallery.files import Files
from gallery.search.request import Answer, SearchRequest
from gallery.search.run import Searcher
from gallery.settings import GallerySettings
from gallery.snapshot import Galleries
from gallery.store import Store
from gallery.transforms import Transforms
from models.runtime import load_transform


class Opened:
    """The galleries of a folder that nobody else changes meanwhile."""

    def __init__(self, folder: Path) -> None:
        """Open every gallery at its present version."""
        settings = GallerySettings(data=folder)
        faiss.omp_set_num_threads(settings.threads_used)  # as `forwardfill serve` does by the environment
        files = Files(folder)
        transforms = Transforms(files, load_transform)
        self.catalog = Catalog(settings.database)
        self._world = Galleries(self.catalog, files).refresh()
        self._searcher = Searcher.of(Store(self.catalog, files, transforms, settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.catalog.close()

    def search(self, gallery: str, request: SearchRequest) -> Answer:
        """Search as an API process does."""
        return self._searcher.search(self._world, gallery, request)
