"""Clients that write at once share a commit, and none notices it but by the time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx

from gallery.catalog import galleries as gallery_rows
from gallery.group_commit import GroupCommit
from tests.gallery.gathering import WAIT, Watched
from tests.service.world import GALLERY, UNITS, World


def test_each_of_many_clients_is_answered_for_its_own_items_and_sees_them_at_once(world: World) -> None:
    together = Watched(1)
    world.app.state.process.group_commit = GroupCommit(world.store, together)
    before = world.get(f"/galleries/{GALLERY}")["version"]
    unit = UNITS[0].tolist()
    bodies = [
        [{"id": "a", "embedding": unit}],
        [{"id": "b", "embedding": unit}, {"id": "c", "embedding": unit, "payload": {"axis": 0}}],
        [{"id": "x", "embedding": unit}, {"id": "y", "embedding": unit, "payload": {"text": "\0"}}],
        [{"id": "d", "embedding": unit, "payload": {"axis": 7}}],
    ]

    def write(body: list[dict[str, object]]) -> tuple[httpx.Response, set[str]]:
        with httpx.Client(base_url=world.client.base_url, timeout=WAIT) as client:
            answer = client.post(f"/galleries/{GALLERY}/items", json={"model": "old", "items": body})
            hits = client.post(f"/galleries/{GALLERY}/search", json={"model": "old", "vector": unit, "k": 99}).json()
            return answer, {hit["id"] for hit in hits["hits"]}

    with ThreadPoolExecutor(len(bodies)) as clients:
        with world.store.catalog.transaction() as tx:
            gallery_rows.bump(tx.session, gallery_rows.gallery_row(tx.session, GALLERY).id)  # holds up every commit
            answers = [clients.submit(write, bodies[0])]
            assert together.one_more_leads()
            for body in bodies[1:]:
                answers.append(clients.submit(write, body))
                assert together.one_more_waits()
        first, two, bad, last = (answer.result(WAIT) for answer in answers)
    assert first[0].json() == {"upserted": 1, "version": before + 2}
    assert two[0].json() == {"upserted": 2, "version": before + 3}
    assert last[0].json() == {"upserted": 1, "version": before + 3}
    assert world.refused(bad[0], 422, "invalid_item")["errors"][0]["pointer"] == "/items/1/payload"
    for body, (answer, seen) in zip(bodies, (first, two, bad, last), strict=True):
        assert answer.is_error or {str(item["id"]) for item in body} <= seen
    assert world.get(f"/galleries/{GALLERY}/items/c")["payload"] == {"axis": 0}
