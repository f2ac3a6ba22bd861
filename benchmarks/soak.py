"""`python -m benchmarks.soak`: for minutes, everything at once on one service, and every answer judged by an oracle.

Eight clients search in both models, four others replace, add and delete items, at the same moments so that commits are shared,
the worker merges segments, and an upgrade runs, is rolled back, and runs again. Nothing may fail, nothing may be wrong, and
memory stays level after the first minute.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from benchmarks import load, ours
from benchmarks.oracle import Hit, Oracle
from benchmarks.processes import end_in_good_order, resident
from benchmarks.report import show
from benchmarks.table import Group, Line, Pair, at_least, at_most, compared, counted, document, exit_code
from benchmarks.vectors import DIMENSION, clustered
from forwardfill.wire import encoded
from gallery.arrays import Vectors
from models.runtime import load_transform

GALLERY = "photos"
CLIENTS, WRITERS = 8, 4
HIDDEN = 64
#: one search in so many asks for everything that there is
WHOLE_EVERY = 20
WRITE_SECONDS, SAMPLE_SECONDS, WARM_SECONDS = 0.5, 2.0, 60.0
#: by all writers together
WRITTEN_AT_ONCE = 60
#: the share of the moments at which somebody asks for a merge of everything
MERGE_OF_ALL = 0.02
#: an upgrade takes about so long, and is left as it is for a while before it is rolled back. What is written meanwhile is
#: upgraded too, so without more than that a second it would never end
UPGRADE_SECONDS, REST_SECONDS = 20.0, 5.0
WRITTEN_PER_SECOND = WRITTEN_AT_ONCE / WRITE_SECONDS
#: revisions that ended longer ago than a request may take are of no search under way
REMEMBERED_SECONDS = 300.0
#: the stated error of what the service may compute in bfloat16, see `FORWARDFILL_LARGEST_ERROR`; ours is in float32
LARGEST_ERROR = 0.01
#: by how much a fitted line may rise over the run
LEVEL = at_most(1.05)
OUT = Path("build/bench")


class Soak:
    """What all threads share."""

    def __init__(self, us: ours.Ours, artifact: Path, items: int) -> None:
        """Prepare vectors for as many items as there can be."""
        self.us = us
        self.oracle = Oracle({ours.NEW: LARGEST_ERROR})
        self.stop = threading.Event()
        self.wrongs: list[str] = []
        self.failures: list[str] = []
        self.searches = self.whole = self.writes = self.upgrades = 0
        #: the gallery's version after each upsert
        self.versions = Counter[int]()
        self.memory: list[tuple[float, int]] = []
        self.pool = clustered(items).items
        self._transform = load_transform(artifact)
        self._counting = threading.Lock()

    def keep(self, act: Callable[[], None], what: str) -> threading.Thread:
        """Do something over and over, in a thread, until the time is up or it fails."""

        def run() -> None:
            try:
                while not self.stop.is_set():
                    act()
            except Exception as error:  # noqa: BLE001 - every failure counts, whatever it is
                self.failures.append(f"{what}: {error!r}")

        thread = threading.Thread(target=run, name=what, daemon=True)
        thread.start()
        return thread

    def write(self, random: np.random.Generator, rows: Sequence[int]) -> None:
        """Write items with vectors that they never had."""
        noise = random.standard_normal((2, len(rows), DIMENSION)).astype(np.float32)
        old, side = self.pool[list(rows)] + 0.1 * noise[0], noise[1]
        new, ids = self._transform(old, side), [str(row) for row in rows]
        written = {item: {ours.OLD: old[at], ours.NEW: new[at]} for at, item in enumerate(ids)}
        self.oracle.writing(time.monotonic(), written)
        version = self.us.client.upsert_arrow(GALLERY, ours.OLD, ours.stream(ids, old, side))["version"]
        self.oracle.acknowledged(time.monotonic(), ids)
        with self._counting:
            self.writes += 1
            self.versions[version] += 1

    def delete(self, rows: Sequence[int]) -> None:
        """Delete items, some of which are deleted already."""
        ids = [str(row) for row in rows]
        self.oracle.deleting(time.monotonic(), ids)
        self.us.client.delete_items(GALLERY, ids)
        self.oracle.acknowledged(time.monotonic(), ids)
        with self._counting:
            self.writes += 1

    def search(self, connection: load.Connection, random: np.random.Generator) -> None:
        """Ask for the nearest, or now and then for everything, and judge the answer."""
        old = self.pool[random.integers(len(self.pool))] + 0.1 * random.standard_normal(DIMENSION).astype(np.float32)
        new = self._transform(old[None], np.zeros((1, DIMENSION), np.float32))[0]
        whole = bool(random.integers(WHOLE_EVERY) == 0)
        model, query = (ours.OLD, old) if random.integers(3) == 0 else (ours.NEW, new)
        asked = time.monotonic()
        answer = connection.ask(_request(model, query, old, k=2 * len(self.pool) if whole else 10))
        answered = time.monotonic()
        if answer.status != 200:
            self.failures.append(f"search: {answer.status} {answer.body[:300]!r}")
            return
        hits = [Hit(hit["id"], hit["score"]) for hit in orjson.loads(answer.body)["hits"]]
        wrongs = self.oracle.wrongs(model, query, hits, asked, answered, whole=whole)
        with self._counting:
            self.searches, self.whole = self.searches + 1, self.whole + whole
            self.wrongs += [f"{model}{', whole' if whole else ''}: {wrong}" for wrong in wrongs]

    def upgrade(self) -> None:
        """Upgrade, leave it so for a while, and roll it back."""
        rate = len(self.pool) / UPGRADE_SECONDS + WRITTEN_PER_SECOND
        client = self.us.client
        started = client.start_upgrade(GALLERY, transformation=ours.FORWARD, throttle={"items_per_second": rate})["id"]
        while client.upgrade(started)["state"] != "completed":
            if self.stop.wait(0.2):
                return
        self.upgrades += 1
        self.stop.wait(REST_SECONDS)
        client.rollback(started)
        client.wait(started, until="rolled_back", timeout=60)
        self.stop.wait(REST_SECONDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run for the time that was asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--items", type=int, default=5000, help="ids that may be there at once")
    parser.add_argument("--processes", type=int, default=1, help="API processes behind the port")
    parser.add_argument("--out", type=Path, default=OUT, help="where soak.json goes")
    options = parser.parse_args(arguments)
    end_in_good_order()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="forwardfill-soak-") as scratch:
        data = Path(scratch) / "ours"
        group = Group("soak", tuple(_run(data, options.items, options.minutes * 60, options.processes)))
    show(group)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "soak.json").write_bytes(orjson.dumps(document([group]), option=orjson.OPT_INDENT_2))
    return exit_code([group])


def settings(items: int, processes: int) -> dict[str, object]:
    """So that ten minutes see what months would: merges often, large segments that have an index, and a full cache."""
    return {
        "processes": processes,
        "max_k": 2 * items,
        "exact_below": max(100, items // 5),
        "compact_segments": 4,
        "compact_rows": items,
        "retired_seconds": 5.0,
        "mapped_cache_bytes": 8 << 20,
        "largest_error": LARGEST_ERROR,
    }


def _run(data: Path, items: int, seconds: float, processes: int) -> list[Line]:
    artifact = ours.write_artifact(data.with_suffix(".safetensors"), HIDDEN)
    with ours.running(data, settings(items, processes)) as us:
        ours.register(us.client, artifact)
        us.client.create_gallery(GALLERY, ours.OLD)
        soak = Soak(us, artifact, items)
        soak.write(np.random.default_rng(0), range(items))
        threads = _start(soak)
        soak.stop.wait(seconds)
        soak.stop.set()
        for thread in threads:
            thread.join()
        _settle(soak)
    damaged = subprocess.run(
        [sys.executable, "-m", "forwardfill", "verify", "--data", str(data)], capture_output=True, check=False
    )
    return [*_judged(soak), counted("damaged files (`forwardfill verify`)", [damaged.returncode], at_most(0))]


def _start(soak: Soak) -> list[threading.Thread]:
    started = time.monotonic()

    def look() -> None:
        soak.memory.append((time.monotonic() - started, resident(soak.us.server.pid)))
        soak.oracle.forget(time.monotonic() - REMEMBERED_SECONDS)
        soak.stop.wait(SAMPLE_SECONDS)

    threads = [soak.keep(soak.upgrade, "upgrade"), soak.keep(look, "look")]
    threads += [soak.keep(_changing(soak, number), f"writer {number}") for number in range(WRITERS)]
    for number in range(CLIENTS):
        connection, random = load.Connection(soak.us.server.port), np.random.default_rng(100 + number)
        threads.append(soak.keep(_searching(soak, connection, random), f"client {number}"))
    return threads


def _searching(soak: Soak, connection: load.Connection, random: np.random.Generator) -> Callable[[], None]:
    return lambda: soak.search(connection, random)


def _changing(soak: Soak, writer: int) -> Callable[[], None]:
    """What a writer does with its own items, which no other writes: so it knows the order of their revisions."""
    random, own = np.random.default_rng(writer), range(writer, len(soak.pool), WRITERS)

    def change() -> None:
        soak.stop.wait(WRITE_SECONDS - time.monotonic() % WRITE_SECONDS)
        _change(
            soak, random, random.choice(own, size=int(random.integers(1, WRITTEN_AT_ONCE // WRITERS)), replace=False)
        )

    return change


def _change(soak: Soak, random: np.random.Generator, rows: NDArray[np.int64]) -> None:
    """Mostly write, of which most replaces; sometimes delete; seldom ask for a merge of everything."""
    what, some = random.random(), rows.tolist()
    if what < 0.7:
        soak.write(random, some)
    elif what < 1 - MERGE_OF_ALL / WRITERS:
        soak.delete(some[: len(some) // 2 + 1])
    else:
        soak.us.client.compact_gallery(GALLERY)


def _settle(soak: Soak) -> None:
    """Once nobody writes, everything that is there is found, exactly, in both models."""
    connection, random = load.Connection(soak.us.server.port), np.random.default_rng(2)
    before = soak.whole
    while soak.whole < before + 4 and not soak.failures:
        soak.search(connection, random)
    connection.close()


def _request(model: str, query: Vectors, old: Vectors, k: int) -> bytes:
    companions = {} if model == ours.OLD else {ours.OLD: encoded(old)}
    body = {"model": model, "vector": encoded(query), "companions": companions, "k": k}
    return load.post(f"/galleries/{GALLERY}/search", orjson.dumps(body))


def _judged(soak: Soak) -> list[Line]:
    lines = [
        counted(
            "searches",
            [soak.searches],
            note=f"{soak.whole:,} for everything; {soak.writes:,} writes",
        ),
        counted(
            "commits of several writers",
            [sum(writes > 1 for writes in soak.versions.values())],
            at_least(1),
            note=f"of {len(soak.versions):,} commits of upserts",
        ),
        counted("upgrades completed, and rolled back", [soak.upgrades], at_least(1)),
        counted("failed requests", [len(soak.failures)], at_most(0), note="; ".join(soak.failures[:3])),
        counted("wrong answers", [len(soak.wrongs)], at_most(0), note="; ".join(soak.wrongs[:3])),
    ]
    after = [(at, size) for at, size in soak.memory if at >= WARM_SECONDS]
    if len(after) >= 10:
        lines.append(memory(after))
    return lines


def memory(samples: Sequence[tuple[float, int]]) -> Line:
    """The line of (seconds, bytes) samples: what a fitted line ends at, against what it begins with."""
    at, sizes = (np.array(each, np.float64) for each in zip(*samples, strict=True))
    slope, start = (float(each) for each in np.polyfit(at - at[0], sizes, 1))
    first, last = start / 1e6, (start + slope * float(at[-1] - at[0])) / 1e6
    note = f"Pss of service and worker after the first minute; {slope * 60 / 1e6:+.2f} MB a minute"
    return compared("memory at the end, against after a minute", [Pair(last, first)], LEVEL, unit="MB", note=note)


if __name__ == "__main__":
    raise SystemExit(main())
