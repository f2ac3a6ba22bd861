"""Searches without pause, from a process of their own: what users see while their gallery is upgraded.

`Traffic` starts `python -m forwardfill.demo.traffic PLAN` and collects what it tells, one line per search. The process ends
when its input is closed, so it never outlives the one that started it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx
import numpy as np
import orjson

from forwardfill.client import Client
from forwardfill.errors import ForwardfillError

STOP_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to search for, over and over."""

    url: str
    gallery: str
    #: its live items: every search must have looked at exactly these
    items: int
    old_model: str
    new_model: str
    k: int
    #: an .npz file with `ids`, and per id the vectors `old` and `new`
    queries: str

    @property
    def hits(self) -> int:
        """How many hits an answer must have."""
        return min(self.k, self.items)


class Record(NamedTuple):
    """One search as its sender saw it."""

    #: seconds since 1970 when it was sent
    at: float
    #: the query's model
    model: str
    #: until the answer was there
    seconds: float
    #: what was wrong, None if nothing
    failure: str | None


class TrafficStoppedError(Exception):
    """The searching process ended by itself."""


def judge(answer: Mapping[str, Any], plan: Plan, model: str, own: str | None = None) -> str | None:
    """Say what is wrong with an answer, None if nothing.

    Args:
        answer: as the service gave it.
        plan: what was asked for.
        model: the query's.
        own: the id of an item that must be found, because the query is its stored vector.
    """
    served = answer.get("served")
    if not served:
        return "`served` is missing"
    looked_at = sum(count for route, count in served["routes"].items() if route != "unreachable")
    ids = [hit["id"] for hit in answer.get("hits", ())]
    wrongs = {
        f"scored in {served['score_space']}, not in {model}": served["score_space"] != model,
        f"{looked_at} items were looked at, not {plan.items}": looked_at != plan.items,
        f"{len(ids)} hits, not {plan.hits}": len(ids) != plan.hits,
        "an item was found twice": len(set(ids)) != len(ids),
        f"{own} was not found by its own vector": own is not None and own not in ids,
    }
    return next((wrong for wrong, it_is in wrongs.items() if it_is), None)


class Traffic:
    """The searching process; use it in a `with` statement."""

    def __init__(self, plan: Plan, file: Path) -> None:
        """Prepare to search as planned; `file` is where the process reads its plan."""
        self._plan = plan
        self._file = file
        self._records: list[Record] = []
        self._news = threading.Condition()
        self._ended = False

    def __enter__(self) -> Self:
        self._file.write_bytes(orjson.dumps(asdict(self._plan)))
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "forwardfill.demo.traffic", str(self._file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches the one that started it, which then stops it in good order
        )
        self._reader = threading.Thread(target=self._read, name="traffic", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def records(self) -> Sequence[Record]:
        """All searches so far."""
        return self._records[:]

    @property
    def failed(self) -> int:
        """Searches so far that went wrong."""
        return sum(record.failure is not None for record in self._records)

    def __len__(self) -> int:
        return len(self._records)

    def wait_for(self, count: int, *, timeout: float) -> None:
        """Wait until so many searches were answered.

        Raises:
            TrafficStoppedError: the process ended.
            TimeoutError: they were not answered in time.
        """
        with self._news:
            if not self._news.wait_for(lambda: self._ended or len(self._records) >= count, timeout):
                raise TimeoutError(f"{len(self._records)} of {count} searches were answered in {timeout} s")
        self.check()

    def check(self) -> None:
        """Make sure that it still searches.

        Raises:
            TrafficStoppedError: it does not.
        """
        if self._ended:
            raise TrafficStoppedError(f"the searching process ended with code {self._process.wait()}")

    def stop(self) -> None:
        """Let the search under way finish, and end the process; once is enough."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            with self._news:
                self._records.append(Record(*orjson.loads(line)))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


def searches(plan: Plan, stopping: threading.Event) -> Iterator[Record]:
    """Search until told to stop: by turns a new-model query with its companion, and an old-model query."""
    with np.load(plan.queries) as file:
        ids, old, new = file["ids"].tolist(), file["old"], file["new"]
    order = np.random.default_rng(0).permutation(len(ids))
    turn = 0
    with Client(plan.url) as client:
        while not stopping.is_set():
            row = int(order[turn // 2 % len(ids)])
            if turn % 2:
                yield _search(client, plan, plan.old_model, old[row], {}, own=ids[row])
            else:
                yield _search(client, plan, plan.new_model, new[row], {plan.old_model: old[row]}, own=None)
            turn += 1


def _search(
    client: Client, plan: Plan, model: str, vector: Any, companions: Mapping[str, Any], *, own: str | None
) -> Record:
    at, start = time.time(), time.perf_counter()
    try:
        failure = judge(client.search(plan.gallery, model, vector, companions=companions, k=plan.k), plan, model, own)
    except (ForwardfillError, httpx.HTTPError, ValueError, KeyError) as error:
        failure = f"{type(error).__name__}: {error}"
    return Record(at, model, time.perf_counter() - start, failure)


def main() -> None:
    """Search as the plan says, tell each search as a line, until the input ends."""
    plan = Plan(**orjson.loads(Path(sys.argv[1]).read_bytes()))
    stopping = threading.Event()

    def listen() -> None:
        while os.read(
            sys.stdin.fileno(), 4096
        ):  # `sys.stdin` has a lock, which a daemon thread would hold when the process ends
            pass
        stopping.set()

    threading.Thread(target=listen, daemon=True).start()
    for record in searches(plan, stopping):
        sys.stdout.buffer.write(orjson.dumps(list(record)) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
