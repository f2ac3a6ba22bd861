"""`http`: a search over HTTP against an endpoint that does nothing else: FastAPI, orjson, and one FAISS graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks import hnsw, load, ours
from benchmarks.processes import Server, server
from benchmarks.setting import Setting
from benchmarks.table import Bar, Line, Pair, at_least, at_most, compared
from benchmarks.vectors import nearest, recall

GALLERY = "photos"
ONE_CLIENT = at_most(1.4)
#: by connections
THROUGHPUT: dict[int, Bar] = {8: at_least(0.8), 32: at_least(1.0)}


def measure(setting: Setting) -> Iterator[Line]:
    """One client's p50, then throughput; the same bodies go to both."""
    data, truth = setting.data, nearest(setting.data)
    with setting.folder() as folder, ours.running(folder / "ours") as us:
        ours.register(us.client)
        ours.fill(us.client, GALLERY, data.items)
        ours.wait_indexed(us.client, GALLERY)
        requests = ours.searches(GALLERY, data.queries)
        found = recall(ours.found(load.one_by_one(us.server.port, requests, len(requests)).checked()), truth)
        graph = hnsw.build(data)
        effort, bare_found = hnsw.least_effort(hnsw.found_by(graph, data), truth, found)
        hnsw.save(graph, effort, folder / "index")
        note = f"{data.name}; recall@10 {found:.3f}, of the endpoint {bare_found:.3f} by efSearch {effort}"
        with endpoint(folder / "index", folder / "bare.log") as bare:
            to_bare = [request.replace(f"/galleries/{GALLERY}/search".encode(), b"/search") for request in requests]
            sides = ((us.server, requests), (bare, to_bare))
            yield compared("search over HTTP, p50", _latencies(setting, sides), ONE_CLIENT, unit="ms", note=note)
            for connections, bar in THROUGHPUT.items():
                pairs = _rates(setting, sides, connections)
                yield compared(f"searches per second, {connections} connections", pairs, bar, unit="/s")


def endpoint(index: Path, log: Path) -> AbstractContextManager[Server]:
    """The bare endpoint over an index file, in a process of its own."""
    return server(lambda port: [sys.executable, "-m", "benchmarks.bare", str(index), str(port)], "/ready", log)


_Sides = tuple[tuple[Server, list[bytes]], tuple[Server, list[bytes]]]


def _latencies(setting: Setting, sides: _Sides) -> list[Pair]:
    count = setting.requests(2000)
    return [
        Pair(*(load.one_by_one(each.port, requests, count).checked().percentile(50) for each, requests in sides))
        for _ in range(setting.rounds)
    ]


def _rates(setting: Setting, sides: _Sides, connections: int) -> list[Pair]:
    count = setting.requests(6000)
    return [
        Pair(
            *(
                load.together(each.port, requests, connections=connections, count=count).checked().rate
                for each, requests in sides
            )
        )
        for _ in range(setting.rounds)
    ]
