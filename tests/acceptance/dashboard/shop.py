"""A gallery that an upgrade makes better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from models import artifacts
from models.transformations import Linear, build
from tests.acceptance.gallery_world import base64_of
from tests.acceptance.system import ok

SIGNAL, NOISE, ITEMS, IN_A_SEGMENT, CLASSES = 8, 8, 240, 20, 12


class Gallery:
    """A gallery whose old embeddings are half noise, which the transformation leaves out: an upgrade makes it better."""

    name, old, new, transformation = "shop", "shop.old", "shop.new", "shop.old-to-new"

    def __init__(self, http: httpx.Client, folder: Path) -> None:
        """With items and probes."""
        self.http = http
        random = np.random.default_rng(0)
        centres = random.standard_normal((CLASSES, SIGNAL))

        def seen(classes: np.ndarray) -> np.ndarray:
            signal = centres[classes] + 0.45 * random.standard_normal((len(classes), SIGNAL))
            return np.hstack([signal, 1.5 * random.standard_normal((len(classes), NOISE))]).astype(np.float32)

        module = build(Linear(source_dimension=SIGNAL + NOISE, target_dimension=SIGNAL))
        module.load_state_dict({"weight": torch.eye(SIGNAL + NOISE)[:SIGNAL]})
        sha256 = artifacts.save(folder / "artifact.safetensors", module)
        for name, dimension in ((self.old, SIGNAL + NOISE), (self.new, SIGNAL)):
            ok(http.post("/models", json={"name": name, "dimension": dimension, "metric": "euclidean"}))
        ok(http.put(f"/artifacts/{sha256}", content=(folder / "artifact.safetensors").read_bytes()))
        known = {"name": self.transformation, "source": self.old, "target": self.new, "direction": "forward"}
        ok(http.post("/transformations", json={**known, "method": "affine", "artifact": sha256}))
        ok(http.post("/galleries", json={"name": self.name, "model": self.old}))
        classes = np.arange(ITEMS) % CLASSES
        items = [{"id": f"item-{n}", "embedding": base64_of(vector)} for n, vector in enumerate(seen(classes))]
        for start in range(0, ITEMS, IN_A_SEGMENT):
            body = {"model": self.old, "items": items[start : start + IN_A_SEGMENT]}
            ok(http.post(f"/galleries/{self.name}/items", json=body))
        asked = np.arange(2 * CLASSES) % CLASSES
        probes = [
            {
                "vectors": {self.old: base64_of(vector), self.new: base64_of(vector[:SIGNAL])},
                "relevant": [f"item-{n}" for n in np.flatnonzero(classes == group)],
            }
            for vector, group in zip(seen(asked), asked, strict=True)
        ]
        ok(http.put(f"/galleries/{self.name}/probes", json={"probes": probes}))

    def upgrade(self, **options: Any) -> str:
        """Start one; its id."""
        body = {"gallery": self.name, "target_model": self.new, **options}
        started: str = ok(self.http.post("/admin/upgrades", json=body))["id"]
        return started
