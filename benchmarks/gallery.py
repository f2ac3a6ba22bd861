"""A gallery in this process, as the worker and the API have it, without HTTP."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gallery import ingest
from gallery.catalog import models as model_rows
from gallery.catalog.schema import migrate
from gallery.catalog.tables import ArtifactRow, GalleryRow
from gallery.catalog.transaction import Catalog
from gallery.files import Files
from gallery.search.mapped import MappedColumns
from gallery.search.request import Answer, SearchRequest
from gallery.search.run import Searcher
from gallery.settings import GallerySettings
from gallery.snapshot import Galleries
from gallery.store import Store
from gallery.transforms import Transforms, artifact_file
from gallery.upgrade import drive, lifecycle
from models import artifacts
from models.runtime import load_transform
from models.transformations import Fct, build, describe_architecture

NAME = "bench"


class Gallery:
    """Random vectors in the old space, with side-information, and a transformation with random weights."""

    def __init__(self, folder: Path, network: Fct, *, items: int, segments: int) -> None:
        """Fill a new gallery in `folder`."""
        random = np.random.default_rng(0)
        self.old = random.random((items, network.source_dimension), dtype=np.float32)
        self.side = random.random((items, network.side_dimension or 0), dtype=np.float32)
        self.store = _store(folder)
        sha256 = self._artifact(network)
        self.transform = self.store.transforms.get(sha256)
        self.new_query = self.transform(self.old[:1], self.side[:1])
        self._register(network, sha256)
        self._fill(segments)
        self.galleries = Galleries(self.store.catalog, self.store.files)
        settings = self.store.settings
        mapped = MappedColumns(self.store.transforms, settings.mapped_cache_bytes)
        self.searcher = Searcher(
            self.store.catalog, self.store.transforms, mapped, settings.oversample, settings.min_candidates
        )
        self.world = self.galleries.refresh()

    def search(self, request: SearchRequest) -> Answer:
        """Search as an API process does."""
        return self.searcher.search(self.world, NAME, request)

    def upgrade(self) -> None:
        """Upgrade as a worker does."""
        started = lifecycle.start(self.store, lifecycle.NewUpgrade(NAME, transformation="old-to-new"))
        while drive.due(self.store):
            drive.advance(self.store, self.galleries, self.searcher, started.upgrade_id, "bench")
        self.world = self.galleries.refresh()

    def _artifact(self, network: Fct) -> str:
        part = self.store.files.path(artifact_file("part"))
        part.parent.mkdir(parents=True, exist_ok=True)
        sha256 = artifacts.save(part, build(network))
        part.rename(self.store.files.path(artifact_file(sha256)))
        return sha256

    def _register(self, network: Fct, sha256: str) -> None:
        with self.store.catalog.transaction() as tx:
            old = model_rows.NewModel(
                "old", network.source_dimension, "euclidean", side_dimension=network.side_dimension
            )
            model_rows.add_model(tx.session, old)
            model_rows.add_model(tx.session, model_rows.NewModel("new", network.target_dimension, "euclidean"))
            tx.session.add(ArtifactRow(sha256=sha256, bytes=0, architecture=describe_architecture(network)))
            tx.session.flush()
            forward = model_rows.NewTransformation("old-to-new", "old", "new", "forward", "fct", sha256)
            model_rows.add_transformation(tx.session, forward)
            model = model_rows.model_row(tx.session, "old")
            tx.session.add(GalleryRow(name=NAME, model_id=model.id, index={"kind": "auto"}, storage_dtype="float32"))

    def _fill(self, segments: int) -> None:
        for part in np.array_split(np.arange(len(self.old)), segments):
            ids = [str(row) for row in part]
            items = ingest.NewItems("old", ids, self.old[part], [None] * len(part), self.side[part])
            ingest.upsert(self.store, NAME, items)


def _store(folder: Path) -> Store:
    settings = GallerySettings(data=folder)
    files, catalog = Files(folder), Catalog(settings.database)
    migrate(catalog)
    return Store(catalog, files, Transforms(files, load_transform), settings)
