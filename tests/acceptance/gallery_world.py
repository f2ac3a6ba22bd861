"""What the acceptance tests know: items, two spaces, the map between them, and therefore every right answer."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from models import artifacts
from models.runtime import load_transform
from models.transformations import Fct, build
from tests.acceptance.system import ok

OLD, NEW, SIDE = 16, 24, 8


def base64_of(vector: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()


@dataclass
class World:
    """Items that were acknowledged, by id, and the transformation as the library computes it."""

    artifact: Path
    #: names of the gallery and of both models, unique in the system
    gallery: str
    hidden: int = 64
    seed: int = 0
    items: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.random = np.random.default_rng(self.seed)
        architecture = Fct(source_dimension=OLD, target_dimension=NEW, side_dimension=SIDE, hidden=self.hidden)
        artifacts.save(self.artifact, build(architecture))
        self.transform = load_transform(self.artifact)
        self.old, self.new, self.transformation = (f"{self.gallery}-{name}" for name in ("old", "new", "old-to-new"))

    def register(self, http: httpx.Client, **gallery: Any) -> None:
        """Both models, the artifact, the transformation, and an empty gallery, over REST."""
        body = self.artifact.read_bytes()
        sha256 = hashlib.sha256(body).hexdigest()
        for name, dimension, side in ((self.old, OLD, {"dimension": SIDE}), (self.new, NEW, None)):
            model = {"name": name, "dimension": dimension, "metric": "euclidean", "normalized": False}
            ok(http.post("/models", json={**model, "side_information": side, "fingerprint": None}))
        ok(http.put(f"/artifacts/{sha256}", content=body))
        transformation = {"name": self.transformation, "source": self.old, "target": self.new, "artifact": sha256}
        ok(http.post("/transformations", json={**transformation, "direction": "forward", "method": "fct"}))
        ok(http.post("/galleries", json={"name": self.gallery, "model": self.old, **gallery}))

    def make(self, ids: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """New vectors for some ids; not yet acknowledged."""
        old = self.random.standard_normal((len(ids), OLD)).astype(np.float32)
        side = self.random.standard_normal((len(ids), SIDE)).astype(np.float32)
        return {item: (old[row], side[row]) for row, item in enumerate(ids)}

    def upsert(self, http: httpx.Client, ids: Sequence[str]) -> None:
        """Write items, and know them once they are acknowledged."""
        made = self.make(ids)
        items = [
            {"id": item, "embedding": base64_of(old), "side_information": base64_of(side), "payload": {"name": item}}
            for item, (old, side) in made.items()
        ]
        answer = ok(http.post(f"/galleries/{self.gallery}/items", json={"model": self.old, "items": items}))
        assert answer["upserted"] == len(ids)
        self.items.update(made)

    def delete(self, http: httpx.Client, ids: Sequence[str]) -> None:
        answer = ok(http.post(f"/galleries/{self.gallery}/items/delete", json={"ids": list(ids)}))
        assert answer == {"deleted": len(ids), "missing": []}
        for item in ids:
            del self.items[item]

    def derived(self) -> dict[str, np.ndarray]:
        """Every item in the new space, as the library computes it."""
        ids = sorted(self.items)
        old, side = (np.stack([self.items[item][part] for item in ids]) for part in (0, 1))
        return dict(zip(ids, self.transform(old, side), strict=True))

    def query(self) -> tuple[np.ndarray, np.ndarray]:
        """A query in the old and in the new space: near an item, where the nearest is not a matter of rounding."""
        item = sorted(self.items)[int(self.random.integers(len(self.items)))]
        old, side = self.items[item]
        noise = self.random.standard_normal(OLD).astype(np.float32) * 0.05
        return old + noise, self.transform((old + noise)[None], side[None])[0]

    def search(self, http: httpx.Client, model: str, vector: np.ndarray, *, k: int, **more: Any) -> dict[str, Any]:
        companions = {name: base64_of(other) for name, other in more.pop("companions", {}).items()}
        body = {"model": model, "vector": base64_of(vector), "companions": companions, "k": k, **more}
        answer: dict[str, Any] = ok(http.post(f"/galleries/{self.gallery}/search", json=body))
        return answer

    def check(self, http: httpx.Client) -> dict[str, Any]:
        """Every acknowledged item exactly once, with the right score, for queries of both models. The new model's answer."""
        old, new = self.query()
        n = len(self.items)
        by_old = self.search(http, self.old, old, k=n + 10)
        by_new = self.search(http, self.new, new, k=n + 10, companions={self.old: old})
        self._same(by_old, {item: vectors[0] for item, vectors in self.items.items()}, old)
        self._same(by_new, self.derived(), new)
        assert by_new["served"]["score_space"] == self.new
        return by_new

    def _same(self, answer: dict[str, Any], vectors: dict[str, np.ndarray], query: np.ndarray) -> None:
        found = {hit["id"]: hit["score"] for hit in answer["hits"]}
        assert len(found) == len(answer["hits"]), "an item was found twice"
        assert set(found) == set(vectors), (
            f"lost {sorted(set(vectors) - set(found))[:5]}, came back {sorted(set(found) - set(vectors))[:5]}"
        )
        for item, vector in vectors.items():
            assert abs(found[item] - float(np.linalg.norm(vector - query))) < 1e-3, item
        assert sum(answer["served"]["routes"].values()) == len(vectors)


class Traffic:
    """Searches without pause from a thread of their own, over every API process; what went wrong is kept."""

    def __init__(self, world: World, urls: Sequence[str]) -> None:
        self.searches = 0
        self.failures: list[str] = []
        self._world = world
        self._queries = [world.query() for _ in range(16)]
        self._clients = [httpx.Client(base_url=url, timeout=60) for url in urls]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for http in self._clients:
            http.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            http = self._clients[self.searches % len(self._clients)]
            old, new = self._queries[self.searches % len(self._queries)]
            try:
                if self.searches % 3:
                    answer = self._world.search(http, self._world.new, new, k=10, companions={self._world.old: old})
                else:
                    answer = self._world.search(http, self._world.old, old, k=10)
                self._judge(answer)
            except (AssertionError, httpx.HTTPError) as error:
                self.failures.append(repr(error))
            self.searches += 1

    def _judge(self, answer: dict[str, Any]) -> None:
        ids = [hit["id"] for hit in answer["hits"]]
        scores = [hit["score"] for hit in answer["hits"]]
        assert len(ids) == len(set(ids)) == 10, ids
        assert scores == sorted(scores)
        assert answer["served"]["routes"]["unreachable"] == 0
