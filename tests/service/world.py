"""A real service in this process: uvicorn on a free port, SQLite, a data folder, real artifacts, a client.

There is no worker: `World.work` does what a worker does, step by step, so that a test can look at any moment of an upgrade.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI

from gallery.catalog.schema import migrate
from gallery.search.run import Searcher
from gallery.settings import GallerySettings
from gallery.snapshot import Galleries
from gallery.store import Store
from gallery.upgrade import drive
from models.artifacts import save
from models.transformations import Linear, Transformation, build
from service.app import build_store, create_app
from service.protocol import Protocol
from service.settings import ServiceSettings
from service.telemetry import configure_logs

OLD, NEW, SIDE = 4, 5, 2  # dimensions
GALLERY = "photos"
UNITS = np.eye(OLD, dtype=np.float32)


def linear(weight: Any, **kwargs: Any) -> Transformation:
    """A linear transformation of a (target, source) matrix."""
    weight = torch.as_tensor(np.asarray(weight), dtype=torch.float32)
    target, source = weight.shape
    module = build(Linear(source_dimension=source, target_dimension=target, **kwargs))
    module.load_state_dict({"weight": weight}, strict=True)
    return module


def forward() -> Transformation:
    """From the old model to the new one: the axes move on by one, and the first becomes a zero."""
    return linear(np.vstack([np.zeros((1, OLD)), np.eye(OLD)]))


def backward() -> Transformation:
    """From the new model to the old one."""
    return linear(np.hstack([np.zeros((OLD, 1)), np.eye(OLD)]))


@dataclass
class World:
    """The service, and what is around it."""

    client: httpx.Client
    store: Store
    app: FastAPI
    folder: Path
    nudges: list[float] = field(default_factory=list)

    # -- requests -------------------------------------------------------------------------------------------------------

    def post(self, path: str, body: Any = None, *, status: int | tuple[int, ...] = (200, 201, 202), **kw: Any) -> Any:
        """POST, and the parsed answer."""
        return self._parsed(
            self.client.post(path, json=body, **kw) if body is not None else self.client.post(path, **kw), status
        )

    def get(self, path: str, *, status: int = 200, **kw: Any) -> Any:
        """GET, and the parsed answer."""
        return self._parsed(self.client.get(path, **kw), status)

    def refused(self, response: httpx.Response, status: int, code: str) -> Any:
        """The problem that an answer must be."""
        assert response.headers["content-type"] == "application/problem+json", response.text
        problem = response.json()
        assert (response.status_code, problem["code"]) == (status, code), problem
        assert problem["status"] == status
        assert problem["type"].endswith(code)
        assert problem["request_id"] == response.headers["x-request-id"]
        assert problem["title"]
        assert problem["detail"]
        return problem

    def _parsed(self, response: httpx.Response, status: int | tuple[int, ...]) -> Any:
        allowed = (status,) if isinstance(status, int) else status
        assert response.status_code in allowed, response.text
        return response.json() if response.content else None

    # -- things ---------------------------------------------------------------------------------------------------------

    def model(self, name: str, dimension: int, **kw: Any) -> Any:
        """Register a model."""
        return self.post("/models", {"name": name, "dimension": dimension, "metric": "euclidean", **kw})

    def artifact(self, module: Transformation) -> str:
        """Upload an artifact; its digest."""
        path = self.folder / "artifact.safetensors"
        digest = save(path, module)
        self._parsed(self.client.put(f"/artifacts/{digest}", content=path.read_bytes()), (200, 201))
        return digest

    def transformation(self, name: str, source: str, target: str, direction: str, module: Transformation) -> Any:
        """Upload and register a transformation."""
        body = {"name": name, "source": source, "target": target, "direction": direction, "method": "test"}
        return self.post("/transformations", {**body, "artifact": self.artifact(module)})

    def prepared(self, **gallery: Any) -> World:
        """Models old and new, a forward transformation between them, and an empty gallery of the old one."""
        self.models().post("/galleries", {"name": GALLERY, "model": "old", **gallery})
        return self

    def models(self) -> World:
        """Models old and new, and a forward transformation between them."""
        self.model("old", OLD)
        self.model("new", NEW)
        self.transformation("old-to-new", "old", "new", "forward", forward())
        return self

    def filled(self) -> World:
        """Four items in as many segments, one on each axis, with payloads."""
        for at, unit in enumerate(UNITS):
            self.upsert({"id": f"item-{at}", "embedding": unit.tolist(), "payload": {"axis": at, "even": at % 2 == 0}})
        return self

    def upsert(self, *items: Any, model: str = "old", **kw: Any) -> Any:
        """Write items."""
        return self.post(f"/galleries/{GALLERY}/items", {"model": model, "items": list(items)}, **kw)

    def search(self, vector: Any, model: str = "old", *, status: int = 200, **kw: Any) -> Any:
        """Search the gallery."""
        body = {"model": model, "vector": list(map(float, vector)), "k": 10, **kw}
        return self.post(f"/galleries/{GALLERY}/search", body, status=status)

    def old_search(self, axis: int, **kw: Any) -> Any:
        """A query of the old model."""
        return self.search(UNITS[axis], **kw)

    def new_search(self, axis: int, **kw: Any) -> Any:
        """The same query of the new model, with its companion."""
        return self.search([0, *UNITS[axis]], "new", companions={"old": UNITS[axis].tolist()}, **kw)

    # -- upgrades -------------------------------------------------------------------------------------------------------

    def start(self, **kw: Any) -> str:
        """Start an upgrade; its id."""
        upgrade: str = self.post("/admin/upgrades", {"gallery": GALLERY, "transformation": "old-to-new", **kw})["id"]
        return upgrade

    def upgrade(self, upgrade: str) -> Any:
        """Read an upgrade."""
        return self.get(f"/admin/upgrades/{upgrade}")

    def verb(self, upgrade: str, verb: str, body: Any = None, *, status: int = 202) -> Any:
        """Do something to an upgrade."""
        return self.post(f"/admin/upgrades/{upgrade}/{verb}", body, status=status)

    def work(self, *, steps: int = 10_000, until: str | None = None) -> int:
        """Do what a worker does, until nothing is due, or so many steps, or a state is reached; the steps done."""
        galleries, searcher = Galleries(self.store.catalog, self.store.files), Searcher.of(self.store)
        done = 0
        while done < steps:
            due = drive.due(self.store)
            if not due or (until is not None and self.upgrade(due[0])["state"] == until):
                break
            if not drive.advance(self.store, galleries, searcher, due[0], "test"):
                break
            done += 1
        self.app.state.process.galleries.refresh()
        return done

    def upgraded(self, **kw: Any) -> str:
        """A whole upgrade; its id."""
        upgrade = self.start(**kw)
        self.work()
        return upgrade

    # -- what must not change -------------------------------------------------------------------------------------------

    def everything(self) -> dict[str, Any]:
        """Digest of every file but the database's, and every row of every table that a request could change."""
        files = {
            path.relative_to(self.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.glob("data/**/*"))
            if path.is_file() and not path.name.startswith("catalog.sqlite3")
        }
        with self.store.catalog.engine.connect() as connection:
            tables = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
            rows = {
                name: [tuple(row) for row in connection.exec_driver_sql(f"SELECT * FROM {name}")]
                for (name,) in tables.all()
            }
        return {"files": files, "rows": rows}


@contextmanager
def served(app: FastAPI, *, port: int = 0, **config: Any) -> Iterator[str]:
    """The address of an application that runs in a thread."""
    with closing(socket.socket()) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        server = uvicorn.Server(
            uvicorn.Config(app, http=Protocol, log_config=None, access_log=False, lifespan="on", **config)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the service did not start"
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            app.state.process.closing = True
            server.should_exit = True
            thread.join()


@contextmanager
def opened(folder: Path, *, gallery: dict[str, Any] | None = None, **service: Any) -> Iterator[World]:
    """A service on a folder of its own."""
    configure_logs()
    store = build_store(GallerySettings(data=folder / "data", **(gallery or {})))
    migrate(store.catalog)
    nudges: list[float] = []
    app = create_app(store, ServiceSettings(**service), nudge=lambda: nudges.append(time.monotonic()))
    try:
        with served(app) as address, httpx.Client(base_url=address, timeout=60) as client:
            yield World(client, store, app, folder, nudges)
    finally:
        store.catalog.close()


def events(text: str) -> list[tuple[int, str, Any]]:
    """Server-Sent Events as (id, event, data)."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


def probe(world: World, relevant: list[str]) -> None:
    """A probe on each axis, in both models, and what each should find."""
    probes = [
        {"vectors": {"old": unit.tolist(), "new": [0.5, *unit.tolist()]}, "relevant": [item]}
        for unit, item in zip(UNITS, relevant, strict=True)
    ]
    assert world.client.put(f"/galleries/{GALLERY}/probes", json={"probes": probes}).status_code == 200
