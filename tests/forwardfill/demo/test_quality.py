"""Quality from answers: own item left out, one version only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forwardfill.demo.quality import Exam, GalleryMovedError, Queries, fraction_of
from models.evaluation import cross_test


class Service:
    """Searches four labelled points exactly; its versions are given."""

    def __init__(self, points: np.ndarray, versions: list[int]) -> None:
        self.points = points
        self.versions = versions
        self.asked: list[tuple[int, int | None]] = []

    def search_batch(self, gallery: str, model: str, vectors: Any, *, k: int, companions: Any, oversample: Any) -> Any:
        self.asked.append((k, oversample))
        distances = ((vectors[:, None] - self.points) ** 2).sum(axis=2)
        ranked = distances.argsort(axis=1, kind="stable")[:, :k]
        version = self.versions.pop(0) if len(self.versions) > 1 else self.versions[0]
        routes = {"direct": 1, "forward": 3, "backward": 0, "unreachable": 0}
        results = [{"hits": [{"id": f"i{at}"} for at in row]} for row in ranked]
        return {"results": results, "served": {"gallery_version": version, "routes": routes}, "took_ms": 0.0}


POINTS = np.random.default_rng(3).standard_normal((40, 4)).astype(np.float32)
LABELS = np.arange(40) % 4


def exam(service: Service) -> Exam:
    everyone = np.arange(len(POINTS))
    ids = tuple(f"i{at}" for at in everyone)
    return Exam(service, ids, LABELS, short=everyone, whole=everyone)  # type: ignore[arg-type]


def test_it_is_what_an_exhaustive_evaluation_gives() -> None:
    service = Service(POINTS, [1])
    found = exam(service).take("g", Queries("new", POINTS, {"old": POINTS}))
    exact = cross_test(POINTS, POINTS, LABELS)
    assert found.quality.cmc1 == pytest.approx(exact.cmc1)
    assert found.quality.map == pytest.approx(exact.map)
    assert (found.fraction, found.version) == (0.25, 1)


def test_cmc1_comes_from_a_user_s_search_and_map_from_the_whole_ranking() -> None:
    service = Service(POINTS, [1])
    exam(service).take("g", Queries("new", POINTS, {}))
    assert service.asked == [(11, None), (40, 1)]


def test_a_gallery_that_moved_meanwhile_is_measured_again() -> None:
    service = Service(POINTS, [1, 2, 2, 2])
    assert exam(service).take("g", Queries("new", POINTS, {})).version == 2


def test_a_gallery_that_never_stands_still_is_not_measured() -> None:
    service = Service(POINTS, list(range(100)))
    with pytest.raises(GalleryMovedError):
        exam(service).take("g", Queries("new", POINTS, {}), attempts=3)
    assert len(service.asked) == 6


def test_the_fraction_is_of_the_items_that_were_searched() -> None:
    assert fraction_of({"direct": 30, "forward": 10, "backward": 0, "unreachable": 0}) == 0.75
    assert fraction_of({"direct": 0, "forward": 0, "backward": 0, "unreachable": 0}) == 0.0
