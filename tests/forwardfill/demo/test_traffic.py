"""What counts as a failed search."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forwardfill.demo.traffic import Plan, judge, searches

PLAN = Plan(url="http://127.0.0.1:9", gallery="g", items=5, old_model="old", new_model="new", k=3, queries="")


def answer(ids: str = "abc", *, direct: int = 2, forward: int = 3, space: str = "new", **more: int) -> dict[str, Any]:
    routes = {"direct": direct, "forward": forward, "backward": 0, "unreachable": 0, **more}
    return {
        "hits": [{"id": item, "score": 1.0, "origin": "native"} for item in ids],
        "served": {"model": "new", "score_space": space, "gallery_version": 1, "routes": routes},
    }


def test_a_whole_answer_in_the_query_s_space_is_right() -> None:
    assert judge(answer(), PLAN, "new") is None
    assert judge(answer(), PLAN, "new", own="b") is None


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (answer("ab"), "2 hits, not 3"),
        (answer("aba"), "found twice"),
        (answer(direct=1), "4 items were looked at, not 5"),
        (answer(direct=3), "6 items were looked at, not 5"),
        (answer(direct=1, unreachable=1), "4 items were looked at, not 5"),
        (answer(space="old"), "scored in old, not in new"),
        ({"hits": answer()["hits"]}, "`served` is missing"),
        (answer("xyz"), "b was not found by its own vector"),
    ],
)
def test_an_answer_fails_that_lacks_doubles_or_misplaces_something(given: dict[str, Any], complaint: str) -> None:
    assert complaint in (judge(given, PLAN, "new", own="b") or "")


def test_a_gallery_smaller_than_k_gives_all_it_has() -> None:
    small = Plan(url="", gallery="g", items=2, old_model="old", new_model="new", k=3, queries="")
    assert judge(answer("ab", direct=2, forward=0), small, "new") is None
    assert judge(answer("a", direct=2, forward=0), small, "new") == "1 hits, not 2"


def test_a_service_that_does_not_answer_fails_searches_of_both_models_by_turns(tmp_path: Path) -> None:
    file = tmp_path / "queries.npz"
    np.savez(file, ids=np.array(["a", "b"]), old=np.eye(2, dtype=np.float32), new=np.eye(2, dtype=np.float32))
    # Port 9 of this machine: nobody listens there.
    plan = Plan(
        url="http://127.0.0.1:9", gallery="g", items=2, old_model="old", new_model="new", k=1, queries=str(file)
    )
    stopping = threading.Event()
    records = []
    for record in searches(plan, stopping):
        records.append(record)
        if len(records) == 4:
            stopping.set()
    assert [record.model for record in records] == ["new", "old", "new", "old"]
    assert all("ConnectError" in (record.failure or "") for record in records)
