"""Forwardfill as its users have it: everything here goes over REST, to a real process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import torch

from benchmarks import load
from benchmarks.load import Load
from benchmarks.processes import Server, service
from benchmarks.vectors import DIMENSION, K
from forwardfill.client import Client
from forwardfill.wire import encoded
from gallery.arrays import Vectors
from gallery.settings import GallerySettings
from models import artifacts
from models.arithmetic import Rule
from models.runtime import Transform, load_transform
from models.transformations import Fct, build
from workers.settings import WorkerSettings

OLD, NEW, FORWARD = "old", "new", "old-to-new"
#: FCT as published: two layers of 2,048 in the mixer, 5.7 million weights
HIDDEN = 2048
#: no merging, where a measure is about a number of segments
AS_WRITTEN: dict[str, object] = {"compact_segments": 0}

#: as Chroma and PostgreSQL do, of their own accord
ON_ALL_CORES: dict[str, object] = {"processes": os.cpu_count() or 1}

_TIMEOUT = 1800.0
_LOOK_SECONDS = 0.05


class Ours(NamedTuple):
    """A running service."""

    server: Server
    client: Client


@contextmanager
def running(folder: Path, settings: Mapping[str, object] | None = None, *, worker: bool = True) -> Iterator[Ours]:
    """Run the service over a data folder."""
    with service(folder, settings, worker=worker) as server, Client(server.url, timeout=_TIMEOUT) as client:
        yield Ours(server, client)


def write_artifact(path: Path, hidden: int = HIDDEN) -> Path:
    """An FCT network with random weights, as an artifact: its results mean nothing, but it costs the same as a trained one."""
    torch.manual_seed(0)
    network = Fct(source_dimension=DIMENSION, target_dimension=DIMENSION, side_dimension=DIMENSION, hidden=hidden)
    artifacts.save(path, build(network))
    return path


def bare(artifact: Path, sample: tuple[Vectors, Vectors], device: str = "cpu") -> Transform:
    """The forward pass alone, in the number type that processes of ours would choose by a sample."""
    settings = WorkerSettings()
    exact = load_transform(artifact, device=device, rule=Rule(settings.computed_in, settings.largest_error))
    return exact.quickest(*sample) or exact


def register(client: Client, artifact: Path | None = None) -> None:
    """Register the old model; with an artifact also the new model, and side-information for the old one's items."""
    side = None if artifact is None else DIMENSION
    client.register_model(OLD, dimension=DIMENSION, metric="euclidean", side_dimension=side)
    if artifact is not None:
        client.register_model(NEW, dimension=DIMENSION, metric="euclidean")
        digest = client.upload_artifact(artifact)
        client.register_transformation(FORWARD, source=OLD, target=NEW, artifact=digest, method="fct")


def fill(
    client: Client,
    gallery: str,
    items: Vectors,
    sides: Vectors | None = None,
    *,
    segments: int = 1,
    payloads: Sequence[str] | None = None,
) -> None:
    """Make and fill a gallery of so many segments; ids are row numbers, payloads JSON. It does not wait for indexes."""
    client.create_gallery(gallery, OLD)
    for rows in np.array_split(np.arange(len(items)), segments):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        ids = [str(row) for row in rows.tolist()]
        side, payload = None if sides is None else sides[part], None if payloads is None else payloads[part]
        client.upsert_arrow(gallery, OLD, stream(ids, items[part], side, payload))


def stream(
    ids: Sequence[str], embeddings: Vectors, sides: Vectors | None = None, payloads: Sequence[str] | None = None
) -> bytes:
    """Items as an Arrow IPC stream."""
    columns = {"id": pa.array(ids), "embedding": _fixed(embeddings)}
    if sides is not None:
        columns["side_information"] = _fixed(sides)
    if payloads is not None:
        columns["payload"] = pa.array(payloads)
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def wait_indexed(client: Client, gallery: str) -> dict[str, Any]:
    """Wait until every large segment has its index in every model, or was found to be searched exactly.

    Returns:
        The gallery as it stands.

    Raises:
        TimeoutError: no worker came by.
    """
    deadline = time.monotonic() + _TIMEOUT
    while True:
        found = client.gallery(gallery)
        small = found["items"] < found["segments"] * GallerySettings().exact_below
        if small or all(len(column["index"]["segments"]) == found["segments"] for column in found["columns"]):
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{gallery} is not indexed: {found['columns']}")
        time.sleep(_LOOK_SECONDS)


def upgrade(client: Client, gallery: str) -> dict[str, Any]:
    """Bring a gallery to the new model, and wait for it."""
    started = client.start_upgrade(gallery, transformation=FORWARD)
    return dict(client.wait(started["id"], timeout=_TIMEOUT))


def searches(
    gallery: str, queries: Vectors, *, model: str = OLD, companions: Vectors | None = None, **more: object
) -> list[bytes]:
    """The requests of a search for each query (n, dimension); `companions` are the same queries in the old space."""
    requests = []
    for at, query in enumerate(queries):
        body: dict[str, Any] = {"model": model, "vector": encoded(query), "k": K, **more}
        if companions is not None:
            body["companions"] = {OLD: encoded(companions[at])}
        requests.append(load.post(f"/galleries/{gallery}/search", orjson.dumps(body)))
    return requests


def found(done: Load) -> list[list[str]]:
    """The ids of each answer."""
    return [[hit["id"] for hit in orjson.loads(answer.body)["hits"]] for answer in done.answers]


def _fixed(vectors: Vectors) -> Any:
    values = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
