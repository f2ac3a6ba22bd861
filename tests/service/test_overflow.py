"""What a transformation makes too large for a number is found once all the same, and has a score."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.service.world import GALLERY, OLD, UNITS, World, linear

HUGE = 1e18


@pytest.fixture(params=["euclidean", "inner_product", "cosine"])
def world(request: pytest.FixtureRequest, empty: World) -> World:
    for name in ("old", "new"):
        empty.model(name, OLD, metric=request.param)
    empty.transformation("forward", "old", "new", "forward", linear(1e25 * np.eye(OLD)))
    empty.post("/galleries", {"name": GALLERY, "model": "old"})
    for at, unit in enumerate(UNITS):
        empty.upsert({"id": f"item-{at}", "embedding": (unit * (HUGE if at == 0 else 1)).tolist()})
    return empty


def test_every_item_is_found_once_with_a_number_as_its_score(world: World) -> None:
    answer = world.search(UNITS[1], "new", companions={"old": UNITS[1].tolist()})
    assert answer["served"]["score_space"] == "new"
    hits = answer["hits"]
    assert sorted(hit["id"] for hit in hits) == [f"item-{at}" for at in range(4)]
    assert all(isinstance(hit["score"], float) and math.isfinite(hit["score"]) for hit in hits)
    assert hits[0]["id"] in ("item-1", "item-0")


def test_a_query_that_is_mapped_to_zero_or_too_far_is_answered_all_the_same(world: World) -> None:
    world.transformation("backward", "new", "old", "backward", linear(np.diag([1e15, 0, 0, 0])))
    for vector in (UNITS[1], 1e10 * UNITS[0]):
        hits = world.search(vector, "new")["hits"]
        assert sorted(hit["id"] for hit in hits) == [f"item-{at}" for at in range(4)]
        assert all(math.isfinite(hit["score"]) for hit in hits)


def test_a_query_that_has_no_place_in_the_gallerys_space_is_refused(world: World) -> None:
    world.transformation("backward", "new", "old", "backward", linear(1e30 * np.eye(OLD)))
    body = {"model": "new", "vector": (1e18 * UNITS[0]).tolist(), "k": 10}
    problem = world.refused(world.client.post(f"/galleries/{GALLERY}/search", json=body), 422, "invalid_vector")
    assert "backward maps the query beyond float32" in problem["detail"]
