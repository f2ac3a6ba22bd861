"""Clients that write down all they do and are told, for `tests.faults.history` to judge.

Every payload names the write that it came with, and every score is compared with that write's own vector: an answer with the
right ids and another write's vectors is found out.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx
import numpy as np

from tests.acceptance.gallery_world import World, base64_of
from tests.acceptance.system import Api
from tests.faults.history import NO_WRITE, Answer, Outcome, Write

TOLERANCE = 1e-3
ITEMS = [f"item-{n:02}" for n in range(48)]
_WRITES = 10
_WRITE_SECONDS = 0.15
_LOOK_SECONDS = 0.2


class _Vectors(NamedTuple):
    """One item of one write, in both spaces."""

    old: np.ndarray
    new: np.ndarray


@dataclass
class Book:
    """What all clients of one gallery did and were told."""

    world: World
    writes: list[Write] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    #: searches that were not answered
    failures: list[str] = field(default_factory=list)
    _vectors: dict[int, dict[str, _Vectors]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        made = self.world.make(["query"])["query"]
        self.queries = {self.world.old: made[0], self.world.new: self.world.transform(made[0][None], made[1][None])[0]}

    def new(self, ids: Iterable[str]) -> tuple[int, list[dict[str, Any]]]:
        """Vectors for some items, which nobody had before: the number of their write, and a body for them."""
        with self._lock:
            made = self.world.make(list(ids))
            derived = self.world.transform(*(np.stack([vectors[part] for vectors in made.values()]) for part in (0, 1)))
            number = len(self._vectors)
            self._vectors[number] = {
                item: _Vectors(old, new) for (item, (old, _)), new in zip(made.items(), derived, strict=True)
            }
        items = [
            {"id": item, "embedding": base64_of(old), "side_information": base64_of(side), "payload": {"write": number}}
            for item, (old, side) in made.items()
        ]
        return number, items

    def number(self) -> int:
        """Of a write without vectors."""
        with self._lock:
            self._vectors[len(self._vectors)] = {}
            return len(self._vectors) - 1

    def write_of(self, model: str, hit: dict[str, Any]) -> int:
        """Which write a hit shows: the one that its payload names, if the score is of that write's vector."""
        number = (hit["payload"] or {}).get("write", NO_WRITE)
        vectors = self._vectors.get(number, {}).get(hit["id"])
        if vectors is None:
            return NO_WRITE
        vector = vectors.new if model == self.world.new else vectors.old
        right = abs(hit["score"] - float(np.linalg.norm(vector - self.queries[model]))) < TOLERANCE
        return number if right else NO_WRITE


class Client:
    """One client of one API process."""

    def __init__(self, book: Book, api: Api) -> None:
        self._book = book
        self._api = api
        self._gallery = f"/galleries/{book.world.gallery}"

    def upsert(self, ids: Iterable[str]) -> Outcome:
        """Write items anew."""
        number, items = self._book.new(ids)
        body = {"model": self._book.world.old, "items": items}
        return self._write(number, [item["id"] for item in items], f"{self._gallery}/items", body, deletes=False)

    def delete(self, ids: Iterable[str]) -> Outcome:
        """Delete items."""
        gone = list(ids)
        return self._write(self._book.number(), gone, f"{self._gallery}/items/delete", {"ids": gone}, deletes=True)

    def look(self, model: str, http: httpx.Client | None = None) -> Answer | None:
        """Ask for everything; None if that is refused or fails."""
        world, queries = self._book.world, self._book.queries
        others = {world.old: base64_of(queries[world.old])} if model == world.new else {}
        body = {"model": model, "vector": base64_of(queries[model]), "companions": others, "k": 2 * len(ITEMS)}
        process, began = self._process, time.monotonic()
        try:
            answer = (http or self._api.http).post(f"{self._gallery}/search", json={**body, "include": ["payload"]})
        except httpx.TransportError as error:
            self._book.failures.append(repr(error))
            return None
        if answer.status_code == 409:  # the model is retired, or no route leads there
            return None
        if not answer.is_success:
            self._book.failures.append(answer.text)
            return None
        body = answer.json()
        hits = tuple((hit["id"], self._book.write_of(model, hit)) for hit in body["hits"])
        told = Answer(process, began, time.monotonic(), body["served"]["gallery_version"], hits)
        self._book.answers.append(told)
        return told

    @property
    def _process(self) -> str:
        return f"{self._api.port}-{self._api.popen.pid}"

    def _write(self, number: int, ids: list[str], path: str, body: dict[str, Any], *, deletes: bool) -> Outcome:
        process, began, version = self._process, time.monotonic(), None
        outcome: Outcome = "unknown"  # a connection that breaks, and an error that may have come after the commit
        try:
            answer = self._api.http.post(path, json=body)
            if answer.is_success:
                outcome, version = "acknowledged", answer.json().get("version")
            elif answer.status_code < 500:
                outcome = "refused"
        except httpx.TransportError:
            pass
        self._book.writes.append(
            Write(number, process, began, time.monotonic(), frozenset(ids), outcome, deletes, version)
        )
        return outcome


class Traffic:
    """A client that looks without pause and one that writes now and then, for as long as a `with` block runs."""

    def __init__(self, book: Book, api: Api, *, seed: int) -> None:
        self._book, self._api, self._seed = book, api, seed
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._kept, args=(act,)) for act in (self._look, self._write)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._errors and error is None:
            raise self._errors[0]

    def _kept(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - raised again where it is seen
            self._errors.append(error)

    def _look(self) -> None:
        with httpx.Client(base_url=self._api.http.base_url, timeout=60) as http:
            client = Client(self._book, self._api)
            while not self._stop.wait(_LOOK_SECONDS):
                for model in (self._book.world.old, self._book.world.new):
                    client.look(model, http)

    def _write(self) -> None:
        client, chance = Client(self._book, self._api), random.Random(self._seed)
        for _ in range(_WRITES):
            (client.delete if chance.random() < 0.4 else client.upsert)(chance.sample(ITEMS, 4))
            if self._stop.wait(_WRITE_SECONDS):
                return
