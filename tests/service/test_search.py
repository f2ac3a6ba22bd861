"""A search over REST."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import event, update

from gallery.catalog.tables import ItemRow
from tests.service.world import GALLERY, UNITS, World, backward, opened

SEARCH = f"/galleries/{GALLERY}/search"


@pytest.fixture
def statements(world: World) -> list[str]:
    """Every statement that the database is asked, by searches only: the refresher's threads are silenced."""
    world.app.state.process.galleries.refresh()
    asked: list[str] = []

    def listen(_c: object, _cursor: object, statement: str, *_: object) -> None:
        import threading

        if threading.current_thread().name not in {"watch", "tell"}:
            asked.append(statement)

    event.listen(world.store.catalog.engine, "before_cursor_execute", listen)
    return asked


def test_a_search_does_not_touch_the_database(world: World, statements: list[str]) -> None:
    world.old_search(0)
    world.new_search(1)
    world.post(f"{SEARCH}/batch", {"model": "old", "queries": UNITS.tolist(), "k": 2})
    world.refused(world.client.post(SEARCH, json={"model": "old", "vector": [1.0]}), 422, "dimension_mismatch")
    assert statements == []
    world.old_search(0, include=["payload"])
    assert statements


def test_clients_that_search_at_once_get_each_their_own_answer(world: World) -> None:
    alone = [world.old_search(axis)["hits"] for axis in range(4)]
    with ThreadPoolExecutor(12) as clients:
        answers = clients.map(lambda at: world.old_search(at % 4)["hits"], range(48))
        assert all(hits == alone[at % 4] for at, hits in enumerate(answers))


def test_hits_carry_payloads_on_request(world: World) -> None:
    hits = world.old_search(2, k=1, include=["payload"])["hits"]
    assert hits == [{"id": "item-2", "score": 0.0, "origin": "native", "payload": {"axis": 2, "even": True}}]
    assert "payload" not in world.old_search(2, k=1)["hits"][0]


def test_a_batch_whose_answer_would_be_too_large_is_refused_before_all_payloads_are_read(tmp_path: Path) -> None:
    with opened(tmp_path, max_answer_bytes=500_000) as world:
        world.prepared()
        items = [
            {"id": f"i{at}", "embedding": UNITS[at % len(UNITS)].tolist(), "payload": {"t": "x" * 1000}}
            for at in range(1000)
        ]
        world.post(f"/galleries/{GALLERY}/items", {"model": "old", "items": items})
        body = {"model": "old", "queries": [UNITS[0].tolist()] * 20, "k": 1000, "include": ["payload"]}
        tracemalloc.start()
        problem = world.refused(world.client.post(f"{SEARCH}/batch", json=body), 422, "limit_exceeded")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (problem["limit"], problem["maximum"]) == ("max_answer_bytes", 500_000)
        assert peak < 10_000_000
        found = world.post(f"{SEARCH}/batch", {**body, "k": 10})["results"]
        assert [len(each["hits"]) for each in found] == [10] * 20


def test_a_batch_reads_each_payload_once_however_many_queries_find_it(world: World, statements: list[str]) -> None:
    body = {"model": "old", "queries": UNITS.tolist() * 40, "k": 100, "include": ["payload"]}
    answer = world.post(f"{SEARCH}/batch", body)
    assert all(hit["payload"] for each in answer["results"] for hit in each["hits"])
    assert sum("payload" in each for each in statements) == 1


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        ({"axis": 1}, {"item-1"}),
        ({"even": True}, {"item-0", "item-2"}),
        ({"axis": {"lt": 2}}, {"item-0", "item-1"}),
        ({"axis": {"gte": 1, "lte": 2}}, {"item-1", "item-2"}),
        ({"or": [{"axis": 0}, {"axis": {"in": [3, 4]}}]}, {"item-0", "item-3"}),
        ({"not": {"even": True}}, {"item-1", "item-3"}),
        ({"colour": {"exists": True}}, set()),
    ],
)
def test_a_filter_holds_on_every_route(world: World, condition: object, found: set[str]) -> None:
    world.start()
    world.work(steps=3)  # half of the segments are direct, half are forward
    for answer in (world.old_search(0, filter=condition), world.new_search(0, filter=condition)):
        assert {hit["id"] for hit in answer["hits"]} == found


def test_without_a_companion_the_refusal_says_what_would_help(world: World) -> None:
    problem = world.refused(
        world.client.post(SEARCH, json={"model": "new", "vector": [0, 1, 0, 0, 0]}), 409, "no_route"
    )
    assert "old" in problem["detail"]
    assert "new" in problem["detail"]
    assert "companions" in problem["detail"]


def test_a_partial_answer_states_its_coverage(world: World) -> None:
    world.start()
    world.work(steps=3)
    answer = world.search([0, 1, 0, 0, 0], "new", allow_partial=True)
    assert answer["served"]["routes"] == {"direct": 2, "forward": 0, "backward": 0, "unreachable": 2}
    assert {hit["id"] for hit in answer["hits"]} == {"item-0", "item-1"}


def test_a_backward_transformation_answers_new_queries_in_the_old_space(world: World) -> None:
    world.model("compatible", 5)
    world.transformation("compatible-to-old", "compatible", "old", "backward", backward())
    answer = world.search([0, 0, 1, 0, 0], "compatible")
    assert answer["served"]["model"] == "compatible"
    assert answer["served"]["score_space"] == "old"
    assert answer["hits"][0] == {"id": "item-1", "score": 0.0, "origin": "native"}


def test_a_backward_transformation_stands_in_for_a_companion(world: World) -> None:
    world.transformation("new-to-old", "new", "old", "backward", backward())
    answer = world.search([0, 0, 1, 0, 0], "new")
    assert answer["served"]["score_space"] == "new"
    assert answer["served"]["routes"]["forward"] == 4
    assert answer["hits"][0] == {"id": "item-1", "score": 0.0, "origin": "derived"}


def test_a_transformation_that_was_evaluated_serves_as_before(empty: World) -> None:
    empty.prepared()
    sample = {"source_embeddings": UNITS.tolist(), "target_embeddings": [[0.0, *unit] for unit in UNITS.tolist()]}
    assert empty.post("/transformations/old-to-new/evaluate", sample)["evaluation"] is not None
    empty.model("another", 3)  # the process reads models and transformations again
    empty.filled()
    assert empty.new_search(1)["hits"][0]["id"] == "item-1"


def test_a_batch_answers_as_single_searches_do(world: World) -> None:
    world.start()
    world.work(steps=3)
    queries = [
        {"vector": [0, *unit.tolist()], "companions": {"old": unit.tolist()}} for unit in UNITS + np.float32(0.25)
    ]
    batch = world.post(f"{SEARCH}/batch", {"model": "new", "queries": queries, "k": 3, "include": ["payload"]})
    for query, result in zip(queries, batch["results"], strict=True):
        single = world.post(SEARCH, {"model": "new", "k": 3, "include": ["payload"], **query})
        assert result["hits"] == single["hits"]
        assert batch["served"] == single["served"]


def test_a_large_batch_is_answered_in_parts_of_one_snapshot(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = UNITS.tolist() * 5
    body = {"model": "old", "queries": queries, "k": 2}
    whole = world.post(f"{SEARCH}/batch", body)
    monkeypatch.setattr("service.api.search.MOST_CANDIDATES", 3 * 2 * 10)
    parts = world.post(f"{SEARCH}/batch", body)
    assert parts["results"] == whole["results"]
    assert len(parts["results"]) == len(queries)


def test_an_empty_gallery_answers_with_nothing(empty: World) -> None:
    empty.prepared()
    assert empty.old_search(0)["hits"] == []
    assert empty.search([0, 1, 0, 0, 0], "new")["hits"] == []


def test_more_hits_are_not_invented(world: World) -> None:
    assert len(world.old_search(0, k=1000)["hits"]) == 4


def nested(deep: int) -> dict[str, object]:
    payload: dict[str, object] = {}
    for _ in range(deep - 1):
        payload = {"a": payload}
    return payload


def test_a_payload_as_deep_as_is_stored_comes_with_every_answer(world: World) -> None:
    world.upsert({"id": "deep", "embedding": [9, 9, 9, 9], "payload": nested(64)})
    batch = {"model": "old", "queries": [[9, 9, 9, 9]], "k": 1, "include": ["payload"]}
    for deep in (64, 300):  # the second was stored before there was a bound
        with world.store.catalog.transaction("test") as tx:
            tx.session.execute(update(ItemRow).where(ItemRow.item_id == "deep").values(payload=nested(deep)))
        assert world.search([9, 9, 9, 9], k=1, include=["payload"])["hits"][0]["payload"] == nested(deep)
        assert world.post(f"/galleries/{GALLERY}/search/batch", batch)["results"][0]["hits"][0]["id"] == "deep"
        assert world.get(f"/galleries/{GALLERY}/items/deep")["payload"] == nested(deep)


def test_integers_are_numbers(world: World) -> None:
    assert world.post(SEARCH, {"model": "old", "vector": [1, 0, 0, 0], "k": 1})["hits"][0]["score"] == 0.0


def test_no_search_imports_numpys_masked_arrays(tmp_path: Path) -> None:
    """They parse code while they are imported, which Python does not do in two threads at once."""
    code = f"""
import sys
from pathlib import Path
from tests.service.world import opened
with opened(Path({str(tmp_path)!r})) as world:
    world.prepared().filled()
    before = set(sys.modules)
    world.old_search(0)
    world.new_search(0)
    sys.exit("numpy.ma was imported" if "numpy.ma" in sys.modules.keys() - before else 0)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
