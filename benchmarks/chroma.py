"""`chroma`: a Chroma server on the same vectors, at the recall that ours has."""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import orjson

from benchmarks import hnsw, load, ours
from benchmarks.processes import Server, server
from benchmarks.setting import Setting
from benchmarks.table import Line, Pair, at_least, at_most, compared
from benchmarks.vectors import Data, K, nearest, recall

GALLERY = "photos"
CONNECTIONS = 8
INGEST_ROUNDS = 3

_COLLECTIONS = "/api/v2/tenants/default_tenant/databases/default_database/collections"


def measure(setting: Setting) -> Iterator[Line]:
    """Ingest until all is indexed and found; then p50 and throughput."""
    data, truth = setting.data, nearest(setting.data)
    with (
        setting.folder() as folder,
        ours.running(folder / "ours", ours.ON_ALL_CORES) as us,
        chroma(folder / "chroma") as server_,
        httpx.Client(base_url=server_.url, timeout=600) as http,
    ):
        ours.register(us.client)
        ingested = [
            Pair(_ingest(us, f"{GALLERY}-{turn}", data), _Collection.ingested(http, f"{GALLERY}-{turn}", data))
            for turn in range(min(INGEST_ROUNDS, setting.rounds))
        ]
        note = f"{data.name}, until all of them are indexed and found"
        yield compared("items per second of ingest", ingested, at_least(5), unit="/s", note=note)
        requests = ours.searches(f"{GALLERY}-0", data.queries)
        found = recall(ours.found(load.one_by_one(us.server.port, requests, len(requests)).checked()), truth)
        theirs = _Collection.named(http, f"{GALLERY}-0")
        effort, their_found = hnsw.least_effort(theirs.found(data), truth, found)
        theirs.set_effort(effort)
        note = f"{data.name}; recall@10 {found:.3f}, of Chroma {their_found:.3f} by ef_search {effort}"
        sides = ((us.server.port, requests), (server_.port, theirs.queries(data)))
        count = setting.requests(1000)
        latencies = [
            Pair(*(load.one_by_one(port, asked, count).checked().percentile(50) for port, asked in sides))
            for _ in range(setting.rounds)
        ]
        yield compared("search over HTTP, p50", latencies, at_most(0.33), unit="ms", note=note)
        rates = [
            Pair(
                *(
                    load.together(port, asked, connections=CONNECTIONS, count=count).checked().rate
                    for port, asked in sides
                )
            )
            for _ in range(setting.rounds)
        ]
        yield compared(f"searches per second, {CONNECTIONS} connections", rates, at_least(5), unit="/s")


def chroma(folder: Path) -> AbstractContextManager[Server]:
    """The server of the installed package, with its own defaults."""
    program = str(Path(sys.executable).with_name("chroma"))
    return server(
        lambda port: [program, "run", "--path", str(folder), "--host", "127.0.0.1", "--port", str(port)],
        "/api/v2/heartbeat",
        folder.with_suffix(".log"),
        {"ANONYMIZED_TELEMETRY": "False"},
    )


def _ingest(us: ours.Ours, gallery: str, data: Data) -> float:
    """Items per second of ours: one Arrow stream, and then until a worker has built the index."""
    started = time.perf_counter()
    ours.fill(us.client, gallery, data.items)
    ours.wait_indexed(us.client, gallery)
    return len(data.items) / (time.perf_counter() - started)


class _Collection(NamedTuple):
    """Chroma's word for a gallery."""

    http: httpx.Client
    path: str

    @classmethod
    def named(cls, http: httpx.Client, name: str) -> _Collection:
        """One that is there already."""
        return cls(http, f"{_COLLECTIONS}/{_ok(http.get(f'{_COLLECTIONS}/{name}'))['id']}")

    @classmethod
    def ingested(cls, http: httpx.Client, name: str, data: Data) -> float:
        """Make one; items per second, with vectors as base64 and in the largest requests that it takes, as its client does.

        The first search is counted too: it finds all of them, so whatever was put off is done by then.
        """
        body = {"name": name, "configuration": {"hnsw": _graph()}}
        made = cls(http, f"{_COLLECTIONS}/{_ok(http.post(_COLLECTIONS, json=body))['id']}")
        batch = _ok(http.get("/api/v2/pre-flight-checks"))["max_batch_size"]
        started = time.perf_counter()
        for start in range(0, len(data.items), batch):
            rows = range(start, min(start + batch, len(data.items)))
            vectors = data.items[rows.start : rows.stop]
            sent = {
                "ids": [str(row) for row in rows],
                "embeddings": [base64.b64encode(each.tobytes()).decode() for each in vectors],
            }
            _ok(http.post(f"{made.path}/add", content=orjson.dumps(sent), headers=_JSON))
        made._ask(data.queries[:1])
        return len(data.items) / (time.perf_counter() - started)

    def set_effort(self, effort: int) -> None:
        """Let every search have so many candidates in view."""
        _ok(self.http.put(self.path, json={"new_configuration": {"hnsw": {"ef_search": effort}}}))

    def found(self, data: Data) -> Callable[[int], list[list[str]]]:
        """What it finds at an effort."""

        def ask(effort: int) -> list[list[str]]:
            self.set_effort(effort)
            return self._ask(data.queries)

        return ask

    def queries(self, data: Data) -> list[bytes]:
        """The requests, one query each."""
        return [load.post(f"{self.path}/query", _query(query[None])) for query in data.queries]

    def _ask(self, queries: np.ndarray) -> list[list[str]]:
        answer = _ok(self.http.post(f"{self.path}/query", content=_query(queries), headers=_JSON))
        ids: list[list[str]] = answer["ids"]
        return ids


_JSON = {"content-type": "application/json"}


def _graph() -> dict[str, Any]:
    return {"space": "l2", "max_neighbors": hnsw.NEIGHBOURS, "ef_construction": hnsw.CONSTRUCTION}


def _query(queries: np.ndarray) -> bytes:
    body = {"query_embeddings": queries, "n_results": K, "include": ["distances"]}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _ok(response: httpx.Response) -> Any:
    if not response.is_success:
        raise RuntimeError(f"{response.request.url}: {response.status_code} {response.text[:500]}")
    return response.json()
