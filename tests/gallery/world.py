"""A small real gallery in one process, and what its answers must be.

Its models have vectors of small whole numbers and its transformations are whole-number matrices, so every mapped vector and
every squared distance is exact in float32, whatever the batch: scores are compared with `==`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import event

from gallery import ingest
from gallery.arrays import Metric, Vectors
from gallery.catalog import models as model_rows
from gallery.catalog.galleries import gallery_row
from gallery.catalog.schema import migrate
from gallery.catalog.tables import ArtifactRow, GalleryRow
from gallery.catalog.transaction import Catalog
from gallery.catalog.upgrades import Lease, upgrade_row
from gallery.compact import merge
from gallery.compact.plan import Rule
from gallery.files import Files, digest
from gallery.new_items import NewItems
from gallery.search.request import Answer, SearchRequest
from gallery.search.run import Searcher
from gallery.settings import GallerySettings
from gallery.snapshot import Galleries
from gallery.snapshot import World as Seen
from gallery.spaces import Direction
from gallery.store import Store
from gallery.transforms import Transforms, artifact_file
from gallery.upgrade import drive, segment, starting
from gallery.upgrade.states import State

OLD, NEW, SIDE = 4, 5, 2  # dimensions
GALLERY = "photos"


@dataclass(frozen=True)
class Linear:
    """new = old @ embedding + side @ side-information; with a head, the log-variance is old @ head."""

    embedding: Sequence[Sequence[int]]
    side: Sequence[Sequence[int]] | None = None
    head: Sequence[int] | None = None

    def __call__(self, embeddings: NDArray[Any], side: NDArray[Any] | None = None) -> Vectors:
        """A `Transform`."""
        mapped = np.asarray(embeddings, np.float32) @ np.array(self.embedding, np.float32)
        if self.side is not None:
            assert side is not None
            mapped += np.asarray(side, np.float32) @ np.array(self.side, np.float32)
        return np.asarray(mapped, np.float32)

    def uncertainty(self, embeddings: NDArray[Any], side: NDArray[Any] | None = None) -> Vectors | None:
        """What makes it a `Predicting`."""
        if self.head is None:
            return None
        return np.asarray(embeddings, np.float32) @ np.array(self.head, np.float32)

    @property
    def weights(self) -> int:
        """What one row costs."""
        return int(np.size(self.embedding)) + (0 if self.side is None else int(np.size(self.side)))

    @property
    def architecture(self) -> dict[str, Any]:
        """What the catalog records of such an artifact."""
        source, target = np.shape(self.embedding)
        return {
            "source_dimension": source,
            "target_dimension": target,
            "side_dimension": None if self.side is None else len(self.side),
            "uncertainty": self.head is not None,
        }


#: each old axis goes to another new one, some turned round; the last new axis and two others know the side-information
PLAIN = Linear([[0, 1, 0, 0, 0], [-1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
WITH_SIDE = Linear(PLAIN.embedding, [[0, 0, 0, 1, 2], [1, 0, 0, 0, -1]])
#: new -> old: undoes PLAIN, and drops what old has no room for
BACKWARD = Linear([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])


def load(path: Path) -> Linear:
    """The map that an artifact's bytes declare."""
    declared = json.loads(path.read_bytes())
    return Linear(declared["embedding"], declared["side"], declared["head"])


def put_artifact(files: Files, linear: Linear) -> str:
    """Store an artifact under its digest."""
    content = json.dumps({"embedding": linear.embedding, "side": linear.side, "head": linear.head}).encode()
    with files.writing("incoming") as path:
        path.write_bytes(content)
    sha256 = digest(files.path("incoming"))
    files.path(artifact_file(sha256)).parent.mkdir(exist_ok=True)
    files.path("incoming").rename(files.path(artifact_file(sha256)))
    return sha256


@dataclass
class World:
    """One process: what a composition root puts together."""

    store: Store
    galleries: Galleries
    searcher: Searcher

    @classmethod
    def open(
        cls,
        folder: Path,
        url: str = "",
        *,
        files: type[Files] | Any = Files,
        catalog: type[Catalog] | Any = Catalog,
        **settings: Any,
    ) -> World:
        """A process over a data folder and a database that may have been used before."""
        chosen = GallerySettings(data=folder, database_url=url, **settings)
        opened_files = files(folder)
        store = Store(catalog(chosen.database), opened_files, Transforms(opened_files, load), chosen)
        return cls(store, Galleries(store.catalog, store.files), Searcher.of(store))

    def prepare(self, *transformations: tuple[str, str, str, Linear], **gallery: Any) -> World:
        """Migrate, register the models old and new and the transformations, and make the gallery in old."""
        migrate(self.store.catalog)
        self.register("old", OLD, side_dimension=SIDE)
        self.register("new", NEW)
        for name, source, target, linear in transformations:
            self.transformation(name, source, target, linear)
        self.make(GALLERY, **gallery)
        return self

    def register(self, name: str, dimension: int, metric: Metric = "euclidean", **more: Any) -> None:
        """Register a model."""
        with self.store.catalog.transaction() as tx:
            model_rows.add_model(tx.session, model_rows.NewModel(name, dimension, metric, **more))

    def transformation(
        self, name: str, source: str, target: str, linear: Linear, direction: Direction | None = None
    ) -> None:
        """Register a transformation and its artifact; forward where it starts at old, unless something else is said."""
        sha256 = put_artifact(self.store.files, linear)
        direction = direction or ("forward" if source == "old" else "backward")
        with self.store.catalog.transaction() as tx:
            if tx.session.get(ArtifactRow, sha256) is None:
                tx.session.add(ArtifactRow(sha256=sha256, bytes=1, architecture=linear.architecture))
                tx.session.flush()
            new = model_rows.NewTransformation(name, source, target, direction, "linear", sha256)
            model_rows.add_transformation(tx.session, new)

    def make(self, name: str, *, model: str = "old", index: Mapping[str, Any] | None = None, **more: Any) -> None:
        """Make a gallery."""
        with self.store.catalog.transaction() as tx:
            row = model_rows.model_row(tx.session, model)
            tx.session.add(
                GalleryRow(
                    name=name,
                    model_id=row.id,
                    index={"kind": "auto"} if index is None else dict(index),
                    **{"storage_dtype": "float32", **more},
                )
            )

    def upsert(
        self,
        model: str,
        ids: Sequence[str],
        vectors: Any,
        *,
        side: Any = None,
        has_side: Any = None,
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        gallery: str = GALLERY,
    ) -> ingest.Upserted:
        """Write items."""
        items = NewItems(
            model=model,
            ids=ids,
            embeddings=np.asarray(vectors, np.float32),
            payloads=payloads if payloads is not None else [None] * len(ids),
            side=None if side is None else np.asarray(side, np.float32),
            has_side=None if has_side is None else np.asarray(has_side, np.bool_),
        )
        return ingest.upsert(self.store, gallery, items)

    def delete(self, *ids: str, gallery: str = GALLERY) -> ingest.Deleted:
        """Delete items."""
        return ingest.delete(self.store, gallery, ids)

    def search(
        self,
        model: str,
        vectors: Any,
        *,
        k: int = 100,
        companions: Mapping[str, Any] | None = None,
        seen: Seen | None = None,
        gallery: str = GALLERY,
        **more: Any,
    ) -> Answer:
        """Search what this process sees after a refresh, or what it saw."""
        request = SearchRequest(
            model,
            np.asarray(vectors, np.float32),
            k,
            companions={name: np.asarray(given, np.float32) for name, given in (companions or {}).items()},
            **more,
        )
        return self.searcher.search(seen or self.galleries.refresh(), gallery, request)

    def start(self, transformation: str = "forward", *, gallery: str = GALLERY, **more: Any) -> str:
        """Start an upgrade; returns its id."""
        return starting.start(self.store, starting.NewUpgrade(gallery, transformation, **more)).upgrade_id

    def step(self, upgrade: str, owner: str = "worker") -> bool:
        """One step of a worker."""
        return drive.advance(self.store, self.galleries, self.searcher, upgrade, owner)

    def run(self, upgrade: str, owner: str = "worker") -> State:
        """Work until nothing is due."""
        while self.step(upgrade, owner):
            pass
        return self.state(upgrade)

    def compact(self, *, segments: int = 2, rows: int = 1000, everything: bool = True) -> list[tuple[int, ...]]:
        """Merge what there is to merge, as a worker does; returns the merges."""
        done: list[tuple[int, ...]] = []
        for look in merge.looked(self.store):
            while planned := merge.planned(self.store, look, Rule(segments, rows, everything)).merges:
                assert merge.merge(self.store, look.gallery_id, planned[0]), "nothing else happens meanwhile"
                done.append(planned[0])
        return done

    def state(self, upgrade: str) -> State:
        """The state of an upgrade."""
        with self.store.catalog.reading() as session:
            return State(upgrade_row(session, upgrade).state)

    def error(self, upgrade: str) -> str | None:
        """What an upgrade failed with."""
        with self.store.catalog.reading() as session:
            return upgrade_row(session, upgrade).error

    def version(self, gallery: str = GALLERY) -> int:
        """The version of a gallery in the catalog."""
        with self.store.catalog.reading() as session:
            return gallery_row(session, gallery).version

    def close(self) -> None:
        """Let go of the database."""
        self.store.catalog.close()


@contextmanager
def lost_connection(catalog: Catalog, before: str) -> Iterator[None]:
    """Once, right before a statement with these words, PostgreSQL ends the connection; whoever asks again is answered."""
    lost = False

    @event.listens_for(catalog.engine, "before_cursor_execute")
    def cut(_: Any, cursor: Any, statement: str, *__: Any) -> None:
        nonlocal lost
        if not lost and before in statement:
            lost = True
            with suppress(Exception):  # it does not live to tell
                cursor.connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    yield
    assert lost


def work(store: Store, held: Lease) -> None:
    """Do a leased segment, from its start to its end."""
    with segment.renewed(store, held):
        if (derived := segment.derive(store, held)) is not None:
            segment.publish(store, held, derived)


def distance(query: NDArray[Any], vector: NDArray[Any]) -> float:
    """The Euclidean distance of whole-number vectors, as float32 gives it."""
    squared = int(((np.asarray(query, np.int64) - np.asarray(vector, np.int64)) ** 2).sum())
    return float(np.sqrt(np.float32(squared)))


def found(answer: Answer, query: int = 0) -> dict[str, float]:
    """Scores by id; an id that was found twice is an error."""
    hits = answer.hits(query)
    scores = {hit.id: hit.score for hit in hits}
    assert len(scores) == len(hits), f"found twice: {[hit.id for hit in hits]}"
    assert [hit.score for hit in hits] == sorted(hit.score for hit in hits)
    return scores
