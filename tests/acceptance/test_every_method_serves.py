"""What the library trains, the service serves: each method small on digits, exported, registered, searched over REST."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forwardfill.client import Client
from forwardfill.local_service import LocalService
from models.artifacts import save
from models.benchmark.experiment import Experiment, Row
from models.benchmark.runs import Run
from models.evaluation import cmc_from_ranking, map_from_ranking, ranked_relevance
from models.methods import METHODS
from models.transformations import side_dimension
from tests.models.small_experiment import small_experiment

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return small_experiment()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("every-method")
    # As the library computes: of small maps it would be chance which number type is faster.
    settings = {"COMPUTED_IN": "float32"}
    with LocalService(folder / "data", folder / "log", settings) as service, Client(service.url) as client:
        yield client


def served(client: Client, experiment: Experiment, run: Run, row: Row, folder: Path) -> dict[str, float]:
    """Search a gallery of the old model with the new model's queries, and judge what the service answers."""
    trained, direction = experiment.trained(run), row["direction"]
    maps = trained.method.transformations()
    module = maps.forward if direction == "forward" else maps.backward
    assert module is not None
    save(folder / "map", module)
    old, new, gallery = (f"{run.method}-{direction}-{role}" for role in ("old", "new", "gallery"))
    side = experiment.vectors("simclr")["test"] if side_dimension(module.architecture) else None
    vectors = experiment.vectors("old")["test"]
    client.register_model(
        old, dimension=vectors.shape[1], metric=row["metric"], side_dimension=None if side is None else side.shape[1]
    )
    client.register_model(new, dimension=trained.new.shape[1], metric=row["metric"])
    artifact = client.upload_artifact(folder / "map")
    ends = {"source": old, "target": new} if direction == "forward" else {"source": new, "target": old}
    client.register_transformation(
        f"{run.method}-{direction}", artifact=artifact, method=run.method, direction=direction, **ends
    )
    client.create_gallery(gallery, old, index={"kind": "flat"})
    ids = [f"item-{place}" for place in range(len(vectors))]
    client.upsert(gallery, old, ids=ids, embeddings=vectors, side_information=side)
    # As many hits as items: every item is a candidate, so that nothing but the service's arithmetic can differ.
    # A forward route picks its candidates with the old model's vector of the query.
    companions = {old: vectors} if direction == "forward" else None
    answer = client.search_batch(gallery, new, trained.new, k=len(ids), oversample=1, companions=companions)
    routes = {"direct": 0, "forward": 0, "backward": 0, "unreachable": 0}
    way = "forward" if direction == "forward" else "direct"  # a query that was mapped back finds its own kind
    assert answer["served"]["routes"] == {**routes, way: len(ids)}
    assert answer["served"]["score_space"] == (new if direction == "forward" else old)
    return judged(answer, ids, experiment.data.test_labels)


def judged(answer: Any, ids: list[str], labels: np.ndarray) -> dict[str, float]:
    ranked = [[hit["id"] for hit in result["hits"]] for result in answer["results"]]
    relevance, total = ranked_relevance(ranked, labels.tolist(), dict(zip(ids, labels.tolist(), strict=True)), own=ids)
    return {
        "cmc1": cmc_from_ranking(relevance, total),
        "cmc5": cmc_from_ranking(relevance, total, k=5),
        "map": map_from_ranking(relevance, total),
    }


@pytest.mark.parametrize("name", METHODS)
def test_the_service_answers_as_well_as_the_library_measures(
    name: str, client: Client, experiment: Experiment, tmp_path: Path
) -> None:
    run = Run(name=name, method=name, side="simclr" if name in ("fct", "fastfill") else None)
    rows = experiment.rows(run)
    assert rows
    for row in rows:
        found = served(client, experiment, run, row, tmp_path)
        assert found == pytest.approx(row["new_old"], abs=0.005)
        assert found["map"] > 0.15  # by chance 0.1: the spaces were brought together
