"""From old vectors and 2 % that were embedded again to a running upgrade, and to a refused one: over REST, on real vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from forwardfill.client import Client
from forwardfill.local_service import LocalService
from forwardfill.pairs import stream
from tests.real_data import EMBEDDINGS, needs

DIMENSION = 128
STEP = 2  # of the images, every other one: 2 % of these are 600 pairs
PATIENCE_SECONDS = 240.0
pytestmark = [pytest.mark.acceptance, pytest.mark.slow, needs(EMBEDDINGS)]

Vectors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def images() -> tuple[Vectors, Vectors]:
    """By model and `labels`: what a gallery holds, and queries that are not in it."""
    with np.load(EMBEDDINGS) as files:
        every = {
            name: np.concatenate([files[f"{name}_{part}"] for part in ("train", "test")])
            for name in ("old", "new", "labels")
        }
        queries = np.arange(len(files["labels_train"]) + 1, len(every["labels"]), 20)
    stored = np.setdiff1d(np.arange(0, len(every["labels"]), STEP), queries)
    return {name: each[stored] for name, each in every.items()}, {name: each[queries] for name, each in every.items()}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, images: tuple[Vectors, Vectors]) -> Iterator[Client]:
    """A service with a gallery of each model's vectors."""
    folder = tmp_path_factory.mktemp("fit")
    with LocalService(folder / "data", folder / "log", {}) as service, Client(service.url) as client:
        for model in ("old", "new"):
            client.register_model(model, dimension=DIMENSION, metric="cosine")
            client.create_gallery(f"of-{model}", model, index={"kind": "flat"})
            client.upsert(f"of-{model}", model, ids=ids(images[0]), embeddings=images[0][model])
        yield client


def ids(stored: Vectors) -> list[str]:
    return [f"image-{place}" for place in range(len(stored["labels"]))]


def cmc1(client: Client, gallery: str, model: str, images: tuple[Vectors, Vectors]) -> float:
    """The share of queries whose first hit has their label."""
    stored, queries = images
    answer = client.search_batch(gallery, model, queries[model], k=1)
    first = [int(result["hits"][0]["id"].rpartition("-")[2]) for result in answer["results"]]
    return float(np.mean(stored["labels"][first] == queries["labels"]))


def fitted(client: Client, source: str, target: str, images: tuple[Vectors, Vectors]) -> Any:
    """Fit a transformation to 2 % of a gallery, and wait for the verdict."""
    stored, _ = images
    chosen = np.sort(np.random.default_rng(0).permutation(len(stored["labels"]))[: len(stored["labels"]) // 50])
    pairs = stream([ids(stored)[at] for at in chosen], stored[target][chosen], stored["labels"][chosen].tolist())
    started = client.start_fit(f"of-{source}", pairs, name=f"{source}-to-{target}", target=target, method="affine")
    *_, done = client.watch_fit(started["id"])
    assert done["state"] == "completed", done["error"]
    assert done["pairs"] == len(chosen)
    return done


@pytest.mark.timeout(600)
def test_two_percent_of_pairs_lead_to_an_upgrade_that_finds_more(
    client: Client, images: tuple[Vectors, Vectors]
) -> None:
    before = cmc1(client, "of-old", "old", images)
    verdict = fitted(client, "old", "new", images)["verdict"]
    assert verdict["decision"] in ("upgrade", "fuse"), verdict["reason"]
    assert verdict["differences"]["upgrade - stay"]["map"]["low"] > 0
    assert client.transformation("old-to-new")["evaluation"]["verdict"]["decision"] == verdict["decision"]
    upgrade = client.start_upgrade("of-old", transformation="old-to-new")
    client.wait(upgrade["id"], timeout=PATIENCE_SECONDS)
    assert cmc1(client, "of-old", "new", images) > before + 0.02


@pytest.mark.timeout(600)
def test_where_the_new_model_is_worse_the_verdict_says_stay_and_a_gate_refuses(
    client: Client, images: tuple[Vectors, Vectors]
) -> None:
    stored, queries = images
    verdict = fitted(client, "new", "old", images)["verdict"]
    assert verdict["decision"] == "stay"
    assert verdict["differences"]["upgrade - stay"]["map"]["high"] < 0
    before = cmc1(client, "of-new", "new", images)
    names = np.array(ids(stored))
    some = slice(None, None, 5)
    relevant = [names[stored["labels"] == label].tolist() for label in queries["labels"][some]]
    client.set_probes("of-new", {model: queries[model][some] for model in ("old", "new")}, relevant=relevant)
    upgrade = client.start_upgrade("of-new", transformation="new-to-old", gate={"min_cmc1": 0.9 * before})
    refused = client.wait(upgrade["id"], until="failed", timeout=PATIENCE_SECONDS)
    assert "cmc1" in (refused["error"] or "")
    assert cmc1(client, "of-new", "new", images) == before
