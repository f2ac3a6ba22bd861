"""What could differ on the other database."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Connection, Engine, event

from gallery import orphans
from gallery.catalog.transaction import Catalog
from gallery.removal import delete_gallery
from gallery.transforms import artifact_file
from models.artifacts import save
from tests.acceptance.system import wait_for
from tests.service.world import GALLERY, World, linear, opened

SEARCH = f"/galleries/{GALLERY}/search"


@pytest.fixture
def world(tmp_path: Path, postgres_url: str) -> Iterator[World]:
    """The filled gallery, on PostgreSQL."""
    with opened(tmp_path, gallery={"database_url": postgres_url}) as opened_world:
        yield opened_world.prepared().filled()


def test_the_story_is_the_same(world: World) -> None:
    assert [hit["id"] for hit in world.old_search(1, filter={"even": False})["hits"]] == ["item-1", "item-3"]
    upgrade = world.start()
    world.work(steps=3)
    assert world.new_search(1)["served"]["routes"] == {"direct": 2, "forward": 2, "backward": 0, "unreachable": 0}
    world.work()
    assert world.upgrade(upgrade)["state"] == "completed"
    item = world.get(f"/galleries/{GALLERY}/items/item-1")
    assert [column["model"] for column in item["columns"]] == ["new", "old"]
    assert world.verb(upgrade, "rollback")["state"] == "rolled_back"
    assert world.post(f"/galleries/{GALLERY}/items/delete", {"ids": ["item-0", "\0"]})["deleted"] == 1
    assert "forwardfill_upgrade_items_total" in world.client.get("/metrics").text
    assert world.client.delete(f"/galleries/{GALLERY}").status_code == 204


def test_a_host_that_is_gone_is_not_waited_for_longer_than_the_url_says(postgres_url: str) -> None:
    for url, seconds in ((postgres_url, "10"), (f"{postgres_url}&connect_timeout=77", "77")):
        catalog = Catalog(url)
        with catalog.reading() as session:
            connection: Any = session.connection().connection.driver_connection
            assert connection.info.get_parameters()["connect_timeout"] == seconds
            assert connection.info.get_parameters()["tcp_user_timeout"] == "30000"
        catalog.close()


def test_a_write_that_was_suspended_until_the_database_gave_it_up_may_be_tried_again(
    world: World, postgres_admin: Engine
) -> None:
    def suspended(connection: Connection) -> None:
        process = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 1")
        with postgres_admin.connect() as other:
            gone = f"SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {process})"
            wait_for(lambda: other.exec_driver_sql(gone).scalar(), 60, lambda: "it is not given up")

    event.listen(world.store.catalog.engine, "commit", suspended, once=True)
    item = {"id": "late", "embedding": [1, 0, 0, 0]}
    answer = world.client.post(f"/galleries/{GALLERY}/items", json={"model": "old", "items": [item]})
    assert world.refused(answer, 503, "unavailable")
    assert answer.headers["retry-after"]
    assert world.upsert(item)["upserted"] == 1


def test_a_database_that_finds_no_space_is_a_full_disk(world: World) -> None:
    with world.store.catalog.transaction() as tx:
        connection = tx.session.connection()
        connection.exec_driver_sql(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN RAISE EXCEPTION USING ERRCODE = 'disk_full'; END$$"
        )
        connection.exec_driver_sql("CREATE TRIGGER full_disk BEFORE INSERT ON items EXECUTE FUNCTION full_disk()")
    item = {"id": "more", "embedding": [1, 0, 0, 0]}
    answer = world.client.post(f"/galleries/{GALLERY}/items", json={"model": "old", "items": [item]})
    assert "disk of the data folder or of the catalog is full" in world.refused(answer, 503, "unavailable")["detail"]


def test_text_that_it_cannot_hold_is_refused(world: World) -> None:
    query = {"model": "old", "vector": [1, 0, 0, 0]}
    for body in ({**query, "filter": {"a": "\0"}}, {**query, "filter": {"\0": 1}}, {**query, "model": "\0"}):
        world.refused(world.client.post(SEARCH, json=body), 422, "invalid_request")
    item = {"id": "a\0", "embedding": [1, 0, 0, 0]}
    items = {"model": "old", "items": [item]}
    world.refused(world.client.post(f"/galleries/{GALLERY}/items", json=items), 422, "invalid_item")
    model = {"name": "x", "dimension": 2, "metric": "cosine", "description": "\0"}
    world.refused(world.client.post("/models", json=model), 422, "invalid_request")
    model = {"name": "x", "dimension": 2, "metric": "cosine", "fingerprint": "\0"}
    world.refused(world.client.post("/models", json=model), 422, "invalid_request")
    index = {"name": "x", "model": "old", "index": {"kind": "\0"}}
    world.refused(world.client.post("/galleries", json=index), 422, "invalid_index")
    probes = {"probes": [{"vectors": {"old": [1, 0, 0, 0]}, "relevant": ["\0"]}]}
    world.refused(world.client.put(f"/galleries/{GALLERY}/probes", json=probes), 422, "invalid_request")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/galleries/doomed/probes", {"probes": [{"vectors": {"old": [1, 0, 0, 0]}}]}),
        ("POST", "/admin/galleries/doomed/compact", None),
        ("POST", "/admin/upgrades", {"gallery": "doomed", "transformation": "old-to-new", "dry_run": True}),
    ],
)
def test_a_gallery_that_is_deleted_once_it_was_found_is_not_found(
    world: World, method: str, path: str, body: object
) -> None:
    world.post("/galleries", {"name": "doomed", "model": "old"})
    deleted = False

    @event.listens_for(world.store.catalog.engine, "after_cursor_execute")
    def delete(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        nonlocal deleted
        if not deleted and "WHERE galleries.name =" in statement:
            deleted = True
            delete_gallery(world.store, "doomed")

    world.refused(world.client.request(method, path, json=body), 404, "gallery_not_found")
    assert deleted


def test_an_upgrade_whose_gallery_is_deleted_once_it_was_found_is_cancelled_already(world: World) -> None:
    upgrade, deleted = world.start(), False

    @event.listens_for(world.store.catalog.engine, "after_cursor_execute")
    def delete(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        nonlocal deleted
        if not deleted and "WHERE upgrades.id =" in statement:
            deleted = True
            delete_gallery(world.store, GALLERY)

    answer = world.client.post(f"/admin/upgrades/{upgrade}/cancel", json={})
    assert deleted
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")


def test_a_dry_run_that_ends_while_its_gallery_is_deleted_stays_completed(world: World) -> None:
    upgrade, ended = world.start(dry_run=True), False

    @event.listens_for(world.store.catalog.engine, "after_cursor_execute")
    def end(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        nonlocal ended
        if not ended and "AND upgrades.active" in statement:
            ended = True
            world.work()

    assert world.client.delete(f"/galleries/{GALLERY}").status_code == 204
    assert ended
    assert world.upgrade(upgrade)["state"] == "completed"


def test_an_evaluation_that_overflows_has_nulls(world: World) -> None:
    world.transformation("huge", "old", "new", "forward", linear(np.eye(5, 4) * 3e38))
    pairs = {"source_embeddings": (np.eye(4) * 1e10).tolist(), "target_embeddings": np.eye(4, 5).tolist()}
    told = world.post("/transformations/huge/evaluate", pairs)
    assert told["evaluation"]["known_answers"]["mean_cosine"] is None
    assert world.get("/transformations/huge") == told


def test_an_artifact_that_is_swept_before_its_commit_is_there_once_it_is_acknowledged(world: World) -> None:
    digest = save(world.folder / "file", linear(np.eye(5, 4) * 2))
    stored, other = world.store.files.path(artifact_file(digest)), Catalog(world.store.settings.database)

    @event.listens_for(world.store.catalog.engine, "commit")
    def sweep(_: object) -> None:
        if stored.exists():
            os.utime(stored, (0, 0))
            orphans.remove(other, world.store.files, "artifacts", older_than=60)

    answer = world.client.put(f"/artifacts/{digest}", content=(world.folder / "file").read_bytes())
    other.close()
    assert answer.status_code == 201
    assert stored.exists()


def test_probes_that_several_clients_replace_at_once_are_those_of_one(world: World) -> None:
    def put(count: int) -> int:
        probes = {"probes": [{"vectors": {"old": [1, 0, 0, 0]}}] * count}
        return world.client.put(f"/galleries/{GALLERY}/probes", json=probes).status_code

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(put, range(20, 36))) == {200}


def test_of_many_that_make_the_same_thing_at_once_one_makes_it(world: World) -> None:
    model = {"name": "x", "dimension": 2, "metric": "cosine"}
    start = {"gallery": GALLERY, "transformation": "old-to-new"}
    with ThreadPoolExecutor(8) as threads:
        made = [threads.submit(world.client.post, "/models", json=model) for _ in range(8)]
        assert sorted(each.result().status_code for each in made) == [200] * 7 + [201]
        headers = {"Idempotency-Key": "once"}
        begun = [threads.submit(world.client.post, "/admin/upgrades", json=start, headers=headers) for _ in range(8)]
        assert len({each.result().json()["id"] for each in begun}) == 1
        others = [threads.submit(world.client.post, "/admin/upgrades", json=start) for _ in range(8)]
        assert {each.result().status_code for each in others} == {409}
        made = [
            threads.submit(world.client.post, "/galleries", json={"name": "second", "model": "x"}) for _ in range(8)
        ]
        assert sorted(each.result().status_code for each in made) == [201] + [409] * 7
