"""One client of pgvector: what it costs to ask PostgreSQL directly. Imports no more than that takes.

`python -m benchmarks.pgvector_client URI EFFORT QUERIES COUNT` connects, says so with a line, waits for a line, searches
COUNT times, and says so with another line. Several of them do not share an interpreter's lock.
"""

from __future__ import annotations

import sys
import time
from itertools import cycle, islice
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector.psycopg import register_vector

K = 10
#: ids are text here as they are with us, and scores are answered too
SELECT = f"SELECT id, embedding <-> %b AS score FROM items ORDER BY embedding <-> %b LIMIT {K}"

Connection = psycopg.Connection[Any]


def connect(uri: str) -> Connection:
    """Connect; searches use the graph even where the planner thinks the table too small for it."""
    connection = psycopg.connect(uri, autocommit=True)
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    connection.execute("SET enable_seqscan = off")
    register_vector(connection)
    return connection


def set_effort(connection: Connection, effort: int) -> None:
    """Let every search of a connection have so many candidates in view."""
    connection.execute(f"SET hnsw.ef_search = {effort}")


def ask(connection: Connection, query: NDArray[np.float32]) -> list[Any]:
    """The nearest items, as (id, score)."""
    return connection.execute(SELECT, (query, query), prepare=True, binary=True).fetchall()


def latencies(connection: Connection, queries: NDArray[np.float32], count: int) -> list[float]:
    """Seconds of each of `count` searches."""
    seconds = []
    for query in islice(cycle(queries), count):
        started = time.perf_counter()
        ask(connection, query)
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Be one of several clients."""
    uri, effort, queries, count = sys.argv[1:]
    asked = np.load(queries)
    with connect(uri) as connection:
        set_effort(connection, int(effort))
        latencies(connection, asked, 20)
        print("ready", flush=True)
        sys.stdin.readline()
        latencies(connection, asked, int(count))
        print("done", flush=True)


if __name__ == "__main__":
    main()
