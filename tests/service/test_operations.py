"""Health, limits, metrics, overload, failures."""

from __future__ import annotations

import base64
import hashlib
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from errno import EMFILE
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
import structlog
from sqlalchemy import event, select, text
from sqlalchemy.orm import Session

from gallery import faults
from gallery.catalog import latencies as latency_rows
from gallery.catalog.tables import SearchLatencyRow
from service import metrics
from service.arrow import read_items
from service.metrics import Latencies
from service.server import configured
from tests.acceptance.system import wait_for
from tests.service.world import GALLERY, UNITS, World, opened

PATIENCE_SECONDS = 20.0
SEARCH = f"/galleries/{GALLERY}/search"
QUERY = {"model": "old", "vector": UNITS[0].tolist()}


def test_info_publishes_version_and_limits(empty: World) -> None:
    info = empty.get("/info")
    assert info["name"] == "forwardfill"
    assert info["limits"] == {
        "max_body_bytes": 64 << 20,
        "max_arrow_bytes": 1 << 30,
        "max_artifact_bytes": 1 << 30,
        "max_answer_bytes": 256 << 20,
        "max_items_per_upsert": 10_000,
        "max_items_per_arrow": 1_000_000,
        "max_fit_pairs": 100_000,
        "max_k": 1000,
        "max_dimension": 8192,
        "max_queries": 1000,
    }


def test_a_search_that_names_no_number_of_hits_passes_no_limit_of_them(tmp_path: Path) -> None:
    with opened(tmp_path, gallery={"max_k": 3}) as world:
        world.prepared().filled()
        assert len(world.post(SEARCH, QUERY)["hits"]) == 3
        assert (
            len(world.post(SEARCH + "/batch", {"model": "old", "queries": [QUERY["vector"]]})["results"][0]["hits"])
            == 3
        )
        explained = {"model": "old", "vector": base64.b64encode(UNITS[0].tobytes()).decode()}
        assert len(world.get(SEARCH + "/explain", params=explained)["hits"]) == 3
        world.refused(world.client.post(SEARCH, json={**QUERY, "k": 4}), 422, "limit_exceeded")


def test_health_answers_those_who_ask_for_the_head_only(empty: World) -> None:
    for path in ("/health/live", "/health/ready"):
        answer = empty.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert empty.client.post(path).headers["allow"] == "GET, HEAD"


def test_what_is_alerted_on_when_it_grows_is_zero_before(world: World) -> None:
    def counted() -> list[str]:
        lines = world.client.get("/metrics").text.splitlines()
        return [line for line in lines if line.startswith(("forwardfill_searches_total", "forwardfill_upgrade_items"))]

    outcomes = ("answered", "partial", "refused", "failed")
    searches = [f'forwardfill_searches_total{{outcome="{each}"}} 0.0' for each in outcomes]
    assert counted() == searches
    world.start()  # no worker takes it up
    assert counted() == [*searches, 'forwardfill_upgrade_items_total{gallery="photos"} 0.0']


def test_metrics_count_searches_and_upgraded_items(world: World) -> None:
    world.old_search(0)
    world.client.post(SEARCH, json={**QUERY, "vector": [1]})
    world.upgraded()
    lines = world.client.get("/metrics").text.splitlines()
    assert "forwardfill_search_seconds_count 1.0" in lines
    assert 'forwardfill_searches_total{outcome="answered"} 1.0' in lines
    assert 'forwardfill_searches_total{outcome="refused"} 1.0' in lines
    assert 'forwardfill_searched_items_total{route="direct"} 4.0' in lines
    assert 'forwardfill_upgrade_items_total{gallery="photos"} 4.0' in lines
    assert 'forwardfill_upgrades{state="completed"} 1.0' in lines
    assert 'forwardfill_gallery_items{gallery="photos"} 4.0' in lines
    route = "/galleries/{gallery}/search"
    assert f'forwardfill_http_requests_total{{method="POST",route="{route}",status="422"}} 1.0' in lines


def test_metrics_count_the_items_that_were_written_and_not_those_that_were_refused(empty: World) -> None:
    empty.prepared().filled()
    empty.upsert({"id": "new", "embedding": UNITS[0].tolist()}, {"id": "item-1", "embedding": UNITS[1].tolist()})
    empty.upsert({"id": "short", "embedding": [1.0]}, status=422)
    assert "forwardfill_upserted_items_total 6.0" in empty.client.get("/metrics").text.splitlines()


def test_the_count_of_upgraded_items_does_not_fall_with_what_it_counts(world: World) -> None:
    world.upgraded()
    world.client.delete(f"/galleries/{GALLERY}")
    assert 'forwardfill_upgrade_items_total{gallery="photos"} 4.0' in world.client.get("/metrics").text
    world.post("/galleries", {"name": GALLERY, "model": "old"})
    world.upsert({"id": "another", "embedding": UNITS[1].tolist()})
    world.upgraded()
    assert 'forwardfill_upgrade_items_total{gallery="photos"} 5.0' in world.client.get("/metrics").text


def test_a_catalog_that_does_not_answer_is_not_ready_but_searches_go_on_and_are_counted(world: World) -> None:
    catalog = world.folder / "data" / "catalog.sqlite3"
    moved = catalog.with_suffix(".away")
    catalog.rename(moved)
    world.store.catalog.engine.dispose()
    try:
        world.refused(world.client.get("/health/ready"), 503, "unavailable")
        assert world.get("/health/live") == {"status": "ok"}
        assert len(world.old_search(0)["hits"]) == 4
        lines = world.client.get("/metrics").text.splitlines()
        assert {"forwardfill_catalog_up 0.0", "forwardfill_search_seconds_count 1.0"} <= set(lines)
        assert 'forwardfill_gallery_items{gallery="photos"} 4.0' in lines
    finally:
        world.store.catalog.engine.dispose()
        for made in catalog.parent.glob("catalog.sqlite3*"):
            made.unlink()
        moved.rename(catalog)
    assert "forwardfill_catalog_up 1.0" in world.client.get("/metrics").text.splitlines()


#: so many hits that the search is no brief one, which would be done on the event loop
MANY = {**QUERY, "k": 101}


def test_beside_a_catalog_of_a_newer_version_it_is_not_ready_and_answers_still(world: World) -> None:
    with world.store.catalog.transaction() as tx:
        tx.session.execute(text("UPDATE alembic_version SET version_num = '20991231'"))
    assert world.client.get("/health/ready").status_code == 503
    assert world.old_search(1)["hits"]


def test_overload_is_refused_and_not_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, max_concurrent_searches=2, max_waiting_searches=1) as world:
        world.prepared().filled()
        release, find = threading.Event(), type(world.app.state.process.searcher).search

        def slow(*given: Any, **named: Any) -> Any:
            release.wait(20)
            return find(*given, **named)

        monkeypatch.setattr(type(world.app.state.process.searcher), "search", slow)
        with ThreadPoolExecutor(4) as threads:
            sent = [threads.submit(world.client.post, SEARCH, json=MANY) for _ in range(4)]
            assert wait(sent, timeout=20, return_when=FIRST_COMPLETED).done
            # Others are not held up: searches have slots of their own.
            assert world.get(f"/galleries/{GALLERY}")["items"] == 4
            release.set()
            answers = [each.result() for each in sent]
        assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 429]
        (refused,) = (answer for answer in answers if answer.status_code == 429)
        world.refused(refused, 429, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert world.client.post(SEARCH, json=QUERY).status_code == 200


def test_a_crash_answers_with_a_problem_that_says_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> Any:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(type(world.app.state.process.searcher), "search", crash)
    answer = world.client.post(SEARCH, json=QUERY)
    world.refused(answer, 500, "internal_error")
    assert "secret" not in answer.text


def test_damage_is_not_the_clients_fault_and_names_no_file(world: World) -> None:
    for artifact in (world.folder / "data" / "artifacts").iterdir():
        artifact.write_bytes(b"other bytes")
    world.app.state.process.store.transforms._loaded.clear()
    body = {"model": "new", "vector": [0, *UNITS[0].tolist()], "companions": {"old": UNITS[0].tolist()}}
    answer = world.client.post(SEARCH, json=body)
    world.refused(answer, 500, "damaged")
    assert "safetensors" not in answer.text


def disk_full(world: World, response: httpx.Response) -> None:
    problem = world.refused(response, 503, "unavailable")
    assert "disk of the data folder or of the catalog is full" in problem["detail"]
    assert response.headers["retry-after"] == "10"


def test_a_full_disk_is_told_to_whoever_writes_and_is_logged_in_one_line(world: World) -> None:
    items = {"model": "old", "items": [{"id": "more", "embedding": UNITS[0].tolist()}]}
    artifact = b"".join(path.read_bytes() for path in (world.folder / "data" / "artifacts").iterdir())
    faults.arm("sync:full:1")
    try:
        with structlog.testing.capture_logs() as logs:
            disk_full(world, world.client.post(f"/galleries/{GALLERY}/items", json=items))
        (said,) = (line for line in logs if line["log_level"] == "error")
        assert said["event"] == "request_failed"
        assert "No space left on device" in said["error"]
        for path in (world.folder / "data" / "artifacts").iterdir():
            path.unlink()
        disk_full(world, world.client.put(f"/artifacts/{hashlib.sha256(artifact).hexdigest()}", content=artifact))
    finally:
        faults.arm(None)
    assert world.get(f"/galleries/{GALLERY}")["items"] == 4
    assert world.post(f"/galleries/{GALLERY}/items", items)["upserted"] == 1


def test_a_catalog_that_finds_no_space_is_a_full_disk(world: World) -> None:
    engine = world.store.catalog.engine

    def shrink(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # which SQLite takes for as many as there are

    event.listen(engine, "connect", shrink)
    engine.dispose()
    items = [{"id": "more", "embedding": UNITS[0].tolist(), "payload": {"text": "a" * 100_000}}]
    disk_full(world, world.client.post(f"/galleries/{GALLERY}/items", json={"model": "old", "items": items}))
    event.remove(engine, "connect", shrink)
    engine.dispose()
    assert world.upsert(*items)["upserted"] == 1


def test_where_no_more_files_can_be_opened_nothing_is_called_damaged(tmp_path: Path) -> None:
    items = {"model": "old", "items": [{"id": "more", "embedding": UNITS[0].tolist()}]}
    with opened(tmp_path, refresh_seconds=3600) as world:
        galleries = world.prepared().filled().app.state.process.galleries
        with opened(tmp_path) as other:
            other.post(f"/galleries/{GALLERY}/items", items)
        with no_more_files():
            galleries.refresh()
            for path, body in ((SEARCH, QUERY), (f"/galleries/{GALLERY}/items", items)):
                answer = world.client.post(path, json=body)
                assert "the limit of open files" in world.refused(answer, 503, "unavailable")["detail"]
                assert answer.headers["retry-after"] == "1"
        galleries.refresh()
        assert world.client.post(SEARCH, json=QUERY).status_code == 200


def test_a_stream_that_cannot_be_opened_for_lack_of_files_is_not_called_damaged(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"], "embedding": [[1.0]]})
    with pa.ipc.new_stream(tmp_path / "items", table.schema) as writer:
        writer.write_table(table)
    with no_more_files(), pytest.raises(OSError, match="Too many open files") as raised:
        read_items(tmp_path / "items", model="old", max_items=1, max_bytes=1000)
    assert raised.value.errno == EMFILE


@contextmanager
def no_more_files() -> Iterator[None]:
    """Let this process open no more files than it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path("/dev/null").open() as next_one:
        lowest = next_one.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def published(world: World) -> list[float]:
    """The latencies that the catalog has, in milliseconds."""
    with world.store.catalog.reading() as session:
        return [row.p99_ms for row in session.scalars(select(SearchLatencyRow))]


def test_search_latency_is_published_only_while_an_upgrade_asks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, watched = threading.Semaphore(0), latency_rows.watched

    def look(session: Session) -> Any:
        found = watched(session)
        looked.release()
        return found

    monkeypatch.setattr(latency_rows, "watched", look)
    world.old_search(0)
    for _ in range(2):  # who looks for the second time has done what the first look asked for
        assert looked.acquire(timeout=PATIENCE_SECONDS)
    assert published(world) == []
    world.start(throttle={"max_search_p99_ms": 1000})

    def told() -> bool:
        world.old_search(0)  # only searches of the last seconds count
        return any(p99_ms > 0 for p99_ms in published(world))

    wait_for(told, PATIENCE_SECONDS, lambda: str(published(world)), every=0.2)
    assert len(published(world)) == 1


def test_a_published_latency_is_taken_back_when_the_process_ends(tmp_path: Path) -> None:
    with opened(tmp_path) as world:
        world.prepared().filled().start(throttle={"max_search_p99_ms": 1000})
        wait_for(lambda: published(world), PATIENCE_SECONDS, lambda: "nothing was published")
    with world.store.catalog.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM search_latencies")).scalar() == 0
    world.store.catalog.close()


def test_p99_is_of_the_slowest_hundredth() -> None:
    latencies = Latencies()
    assert latencies.p99_ms(1) == 0.0
    for at in range(1, 201):
        latencies.record(1, at / 1000)
    assert latencies.p99_ms(1) == pytest.approx(199)
    assert latencies.p99_ms(2) == 0.0


def test_galleries_that_nobody_searches_any_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    latencies = Latencies()
    latencies.record(1, 0.01)
    monkeypatch.setattr(metrics, "_WINDOW_SECONDS", 0.0)
    latencies.record(2, 0.01)
    assert latencies._recent.keys() == {2}


def test_searches_that_are_too_old_to_count_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each of hundreds of galleries, they took a megabyte for as long as it was searched now and then."""
    latencies = Latencies()
    for _ in range(100):
        latencies.record(1, 0.01)
    monkeypatch.setattr(metrics, "_WINDOW_SECONDS", 0.0)
    for _ in range(100):
        latencies.record(1, 0.01)
    assert len(latencies._recent[1]) == 1


def test_each_request_is_one_event_without_what_was_sent(world: World) -> None:
    with structlog.testing.capture_logs() as events:
        world.client.post(SEARCH, json={**QUERY, "vector": [0.987654, 0, 0, 0]}, headers={"x-request-id": "mine"})
        wait_for(lambda: events, PATIENCE_SECONDS, lambda: "nothing was logged")  # it is, after the answer was sent
    (event,) = (event for event in events if event["event"] == "request")
    assert event["path"] == SEARCH
    assert event["status"] == 200
    assert "0.987654" not in str(events)


def test_a_client_lets_go_of_an_idle_connection_before_the_service_does(empty: World) -> None:
    """Otherwise a request may meet the service's hanging up, and nobody answers it."""
    kept = empty.client._transport._pool._keepalive_expiry  # type: ignore[attr-defined]  # httpx says it nowhere else
    assert 2 * kept < configured(empty.app).timeout_keep_alive


def test_pytorch_is_not_imported_before_there_is_something_to_transform() -> None:
    program = "import sys, service.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
