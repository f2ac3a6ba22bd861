"""`million`: what a million items cost: in segments against in one, against a tenth of them, in memory, and at the start."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from benchmarks import load, ours
from benchmarks.opened import Opened
from benchmarks.processes import resident, service
from benchmarks.setting import Setting
from benchmarks.table import Bar, Line, Pair, alone, at_most, compared
from benchmarks.vectors import Data, K, clustered, nearest, recall
from gallery.arrays import Vectors
from gallery.search.request import SearchRequest

GALLERY = "photos"
SEGMENTS = 16
#: by name, the part of the million that a folder has, and in how many segments; None: the gallery is there and empty
SHAPES: dict[str, tuple[float, int] | None] = {
    "empty": None,
    "tenth": (0.1, 1),
    "one": (1.0, 1),
    "many": (1.0, SEGMENTS),
}
IN_SEGMENTS = at_most(2.0)
FROM_A_TENTH = at_most(3.0)
MEMORY = at_most(1.3)
READY_SECONDS = at_most(0.5)


def measure(setting: Setting) -> Iterator[Line]:
    """Four data folders, each filled by a service and its worker, and then served by an API process alone."""
    data = clustered(setting.million)
    with setting.folder() as folder:
        found = {name: _filled(folder / name, _part(data, name)) for name in SHAPES}
        yield from _searches(setting, folder, data.queries, found)
        yield _memory(setting, folder, data)
        yield from _start(setting, folder)


def _part(data: Data, name: str) -> Data:
    shape = SHAPES[name]
    return data.first(0 if shape is None else int(len(data.items) * shape[0]))


def _filled(folder: Path, data: Data) -> float:
    """Fill a folder and build its indexes; the recall of its searches."""
    with ours.running(folder, ours.AS_WRITTEN) as us:
        ours.register(us.client)
        if not len(data.items):
            us.client.create_gallery(GALLERY, ours.OLD)
            return 1.0
        shape = SHAPES[folder.name]
        ours.fill(us.client, GALLERY, data.items, segments=shape[1] if shape else 1)
        ours.wait_indexed(us.client, GALLERY)
        requests = ours.searches(GALLERY, data.queries)
        done = load.one_by_one(us.server.port, requests, len(requests)).checked()
        return recall(ours.found(done), nearest(data))


def _searches(setting: Setting, folder: Path, queries: Vectors, found: dict[str, float]) -> Iterator[Line]:
    """p50 in this process, where nothing hides what a search costs, and over HTTP, as a user has it."""
    judged: list[tuple[str, str, str, Bar]] = [
        (f"{SEGMENTS} segments against one", "many", "one", IN_SEGMENTS),
        (f"{setting.million:,} items against a tenth of them", "one", "tenth", FROM_A_TENTH),
    ]
    for what, ours_, against, bar in judged:
        note = f"recall@10 {found[ours_]:.3f} against {found[against]:.3f}"
        pairs = _in_process(setting, folder / ours_, folder / against, queries)
        yield compared(f"{what}, p50 without HTTP", pairs, bar, unit="ms", note=note)
        pairs = _over_http(setting, folder / ours_, folder / against, queries)
        yield compared(f"{what}, p50 over HTTP", pairs, bar, unit="ms", note=note)


def _in_process(setting: Setting, ours_: Path, against: Path, queries: Vectors) -> list[Pair]:
    with Opened(ours_) as first, Opened(against) as second:
        sides, count = (first, second), setting.requests(len(queries))
        for side in sides:
            _p50(side, queries[:count])
        return [Pair(*(_p50(side, queries[:count]) for side in sides)) for _ in range(setting.rounds)]


def _p50(opened: Opened, queries: Vectors) -> float:
    """Median milliseconds of a search."""
    seconds = []
    gc.disable()
    for query in queries:
        request = SearchRequest(ours.OLD, query[None], K)
        started = time.perf_counter()
        opened.search(GALLERY, request)
        seconds.append(time.perf_counter() - started)
    gc.enable()
    return median(seconds) * 1000


def _over_http(setting: Setting, ours_: Path, against: Path, queries: Vectors) -> list[Pair]:
    requests, count = ours.searches(GALLERY, queries), setting.requests(1000)
    with ExitStack() as stack:
        servers = [stack.enter_context(service(each, worker=False)) for each in (ours_, against)]
        for each in servers:
            load.one_by_one(each.port, requests, len(requests)).checked()
        return [
            Pair(*(load.one_by_one(each.port, requests, count).checked().percentile(50) for each in servers))
            for _ in range(setting.rounds)
        ]


def _memory(setting: Setting, folder: Path, data: Data) -> Line:
    """Memory of an API process after searches that touched everything, beyond one that serves nothing.

    The queries are the items themselves, so that each list and each row near it was read: mapped files count as far as they
    were touched, and this is the most of them.
    """
    asked = data.items[:: max(1, len(data.items) // setting.requests(20_000))]
    requests, vectors = ours.searches(GALLERY, asked), data.items.nbytes
    pairs = []
    for _ in range(min(3, setting.rounds)):
        held = []
        for name in ("many", "empty"):
            with service(folder / name, worker=False) as server:
                load.together(server.port, requests, connections=4, count=len(requests)).checked()
                held.append(resident(server.pid))
        pairs.append(Pair((held[0] - held[1]) / 1e6, vectors / 1e6))
    note = (
        f"Pss of the API process after {len(requests):,} searches, less that of an empty service: private memory, and mapped "
        f"files as far as they were touched; {SEGMENTS} segments"
    )
    return compared(
        "memory beyond an empty service, against the bytes of the vectors", pairs, MEMORY, unit="MB", note=note
    )


def _start(setting: Setting, folder: Path) -> Iterator[Line]:
    """Seconds from the start of an API process until it is ready, in turn for each shape; files are in the page cache."""
    rounds = [{name: _ready(folder / name) for name in ("empty", "one", "many")} for _ in range(setting.rounds)]
    beyond = {name: [each[name] - each["empty"] for each in rounds] for name in ("one", "many")}
    note = f"an empty one takes {median(each['empty'] for each in rounds):.2f} s; {SEGMENTS} segments"
    yield alone("time to ready, beyond an empty service", beyond["many"], READY_SECONDS, unit="s", note=note)
    # Differences of a few milliseconds are noise, and a ratio of them would be too: 10 ms are granted to both.
    pairs = [
        Pair(max(many, 0) + 0.01, max(one, 0) + 0.01) for many, one in zip(beyond["many"], beyond["one"], strict=True)
    ]
    note = "growing no faster than the number of segments"
    yield compared(f"the same, {SEGMENTS} segments against one", pairs, at_most(SEGMENTS), unit="s", note=note)


def _ready(folder: Path) -> float:
    with service(folder, worker=False) as server:
        return server.started_in
