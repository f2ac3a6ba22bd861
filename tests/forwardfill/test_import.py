"""`forwardfill import` against a running service: what is stored, what is refused, and what a kill leaves to do."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from forwardfill.cli import app
from forwardfill.client import Client
from forwardfill.importing import run as loop
from forwardfill.importing.column import BadInput
from forwardfill.importing.formats import columns
from forwardfill.importing.rows import Rows
from forwardfill.importing.state import BLOCK, State, digest
from gallery.catalog.schema import migrate
from gallery.settings import GallerySettings
from service.app import build_store, create_app
from service.settings import ServiceSettings
from tests.service.world import served

ROWS, DIMENSION, SIDE = 50, 3, 2
VECTORS = np.random.default_rng(0).normal(size=(ROWS, DIMENSION)).astype(np.float32)
PATIENCE_SECONDS = 120.0
_names = count()


class Gate:
    """Before the service, or behind it: holds one upsert, and tells that it does."""

    def __init__(self) -> None:
        self.upserts = 0
        self.hold: tuple[int, str] | None = None
        self.held, self.go = threading.Event(), threading.Event()

    async def wait(self) -> None:
        self.held.set()
        await anyio.to_thread.run_sync(self.go.wait)


class Held:
    """The gate as the service's outermost layer."""

    def __init__(self, inner: Any, gate: Gate) -> None:
        self.inner, self.gate = inner, gate

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gate = self.gate
        if scope["type"] != "http" or not (scope["method"] == "POST" and scope["path"].endswith("/items")):
            await self.inner(scope, receive, send)
            return
        gate.upserts += 1
        number = gate.upserts
        if gate.hold == (number, "before it is stored"):
            await gate.wait()

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start" and gate.hold == (number, "before it is acknowledged"):
                await gate.wait()
            await send(message)

        await self.inner(scope, receive, answer)


class Service:
    """A running service with a model, and what its galleries hold."""

    def __init__(self, address: str, gate: Gate) -> None:
        self.address, self.gate = address, gate
        self.client = Client(address)
        for name, dimension, metric in (("old", DIMENSION, "euclidean"), ("cosine", DIMENSION, "cosine")):
            self.client.register_model(name, dimension=dimension, metric=metric, side_dimension=SIDE)  # type: ignore[arg-type]

    def gallery(self, model: str = "old") -> str:
        name = f"g{next(_names)}"
        self.client.create_gallery(name, model)
        return name

    def check(self, gallery: str, ids: list[str], model: str = "old") -> None:
        """A gallery's items are these, in the order of VECTORS: each is found by its vector, and nothing else is there."""
        assert self.client.gallery(gallery)["items"] == ROWS
        best = [each["hits"][0] for each in self.client.search_batch(gallery, model, VECTORS, k=1)["results"]]
        assert [hit["id"] for hit in best] == ids
        assert [hit["score"] for hit in best] == pytest.approx([0.0 if model == "old" else 1.0] * ROWS)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    store = build_store(GallerySettings(data=tmp_path_factory.mktemp("service") / "data"))
    migrate(store.catalog)
    application, gate = create_app(store, ServiceSettings()), Gate()
    application.add_middleware(Held, gate=gate)
    with served(application) as address:
        found = Service(address, gate)
        yield found
        found.client.close()
    store.catalog.close()


@pytest.fixture(autouse=True)
def settings(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDFILL_URL", service.address)
    monkeypatch.delenv("FORWARDFILL_IMPORT_FOLDER", raising=False)
    service.gate.upserts, service.gate.hold = 0, None


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    np.save(tmp_path / "vectors.npy", VECTORS)
    return tmp_path / "vectors.npy"


def imported(gallery: str, vectors: Path, *options: str, model: str = "old") -> Any:
    words = ["import", gallery, "--model", model, "--vectors", str(vectors), *options]
    return CliRunner().invoke(app, words)


def test_rows_are_numbered_where_no_ids_are_given(service: Service, vectors: Path) -> None:
    gallery = service.gallery()
    done = imported(gallery, vectors, "--batch", "20", "--id-prefix", "row-")
    assert done.exit_code == 0, done.output
    assert f"{gallery}: all 50 rows are stored" in done.output
    assert service.gate.upserts == 3
    service.check(gallery, [f"row-{row}" for row in range(ROWS)])
    assert list(vectors.parent.iterdir()) == [vectors], "nothing is left beside the vectors"


def test_everything_of_an_item_may_come_from_one_file_or_from_several(service: Service, tmp_path: Path) -> None:
    side = np.arange(ROWS * SIDE, dtype=np.float32).reshape(ROWS, SIDE)
    ids = [f"i{row}" for row in range(ROWS)]
    payloads = [orjson.dumps({"row": row}).decode() for row in range(ROWS)]
    np.save(tmp_path / "side.npy", side)
    (tmp_path / "ids.txt").write_text("\n".join(ids))
    (tmp_path / "payloads.jsonl").write_text("\n".join(payloads))
    lists = {"embedding": VECTORS.tolist(), "side_information": side.tolist()}
    pq.write_table(pa.table({**lists, "id": ids, "payload": payloads}), tmp_path / "one.parquet")
    pq.write_table(pa.table({"x": lists["embedding"], "key": ids, "note": payloads}), tmp_path / "own.parquet")
    np.save(tmp_path / "vectors.npy", VECTORS)
    beside = ("--side", str(tmp_path / "side.npy"))
    for name, options in {
        "one.parquet": (),
        "own.parquet": (*beside, "--column", "x", "--id-column", "key", "--payload-column", "note"),
        "vectors.npy": (
            *beside,
            *("--ids", str(tmp_path / "ids.txt"), "--payload", str(tmp_path / "payloads.jsonl")),
        ),
    }.items():
        gallery = service.gallery()
        done = imported(gallery, tmp_path / name, *options)
        assert done.exit_code == 0, done.output
        service.check(gallery, ids)
        for row in (0, 31, ROWS - 1):
            item = service.client.item(gallery, ids[row], vectors=True)
            assert item["payload"] == {"row": row}
            assert item["side_information"] == side[row].tolist()
            assert np.array_equal(np.float32(item["columns"][0]["vector"]), VECTORS[row])


@pytest.mark.parametrize("moment", ["before it is stored", "before it is acknowledged"])
def test_an_import_that_was_killed_goes_on_and_every_row_is_there_once(
    service: Service, vectors: Path, moment: str
) -> None:
    gallery, gate = service.gallery(), service.gate
    gate.hold, gate.held, gate.go = (3, moment), threading.Event(), threading.Event()
    words = ["import", gallery, "--model", "old", "--vectors", str(vectors), "--batch", "10"]
    process = subprocess.Popen([sys.executable, "-m", "forwardfill", *words], env=os.environ, stdout=subprocess.DEVNULL)
    try:
        assert gate.held.wait(PATIENCE_SECONDS)
    finally:
        process.kill()
        process.wait()
        gate.go.set()
    state = vectors.with_name(f"vectors.npy.{gallery}.import.json")
    assert orjson.loads(state.read_bytes())["rows"] == 20

    again = imported(gallery, vectors, "--batch", "10")
    assert again.exit_code == 0, again.output
    assert "goes on behind row 19" in again.output
    assert gate.upserts == 6, "two were acknowledged before the kill; three remained, and the one that was held"
    service.check(gallery, [str(row) for row in range(ROWS)])
    assert not state.exists()


def test_an_import_goes_on_within_a_row_group_that_is_larger_than_the_next(service: Service, tmp_path: Path) -> None:
    gallery, path = service.gallery(), tmp_path / "vectors.parquet"
    table = pa.table({"embedding": VECTORS.tolist()})
    with pq.ParquetWriter(path, table.schema) as writer:
        for start, stop in ((0, 24), (24, 26), (26, ROWS)):
            writer.write_table(table.slice(start, stop - start))
    state = State(tmp_path / "state", "x")

    class Stopped(Exception):
        pass

    def stop(stored: int) -> None:
        if stored:
            raise Stopped

    with pytest.raises(Stopped):
        loop.run(service.client, gallery, "old", rows_of(path), state, batch=12, stored=stop)
    assert state.rows() == 12
    loop.run(service.client, gallery, "old", rows_of(path), state, batch=12, stored=lambda _: None)
    service.check(gallery, [str(row) for row in range(ROWS)])


def refused(done: Any, *words: str, code: int = 2) -> None:
    assert done.exit_code == code, done.output
    for word in words:
        assert word in done.output, done.output


def test_what_is_bad_is_refused_before_anything_is_stored(service: Service, vectors: Path) -> None:
    gallery, folder = service.gallery(), vectors.parent
    (folder / "ids.txt").write_text("\n".join("a" if row in (7, 31) else str(row) for row in range(ROWS)))
    (folder / "short.txt").write_text("a\nb\n")
    (folder / "a.faiss").write_bytes(b"x")
    refused(imported(gallery, vectors, "--ids", str(folder / "ids.txt")), "ids.txt, row 31: has the id 'a'", "row 7")
    refused(
        imported(gallery, vectors, "--ids", str(folder / "short.txt")), "short.txt has 2 rows", "vectors.npy has 50"
    )
    refused(imported(gallery, vectors, "--side", str(vectors)), "row 0: has dimension 3, the model 2")
    for option in ("--column", "--id-column"):
        refused(
            imported(gallery, vectors, option, "key"),
            f"vectors.npy: its format has no columns with names; leave {option} out",
        )
    pq.write_table(pa.table({"embedding": VECTORS.tolist(), "word": ["a"] * ROWS}), folder / "words.parquet")
    told = "words.parquet: no column 'key' of single values; name one of these with --id-column: 'word'"
    refused(imported(gallery, folder / "words.parquet", "--id-column", "key"), told)
    refused(imported(gallery, folder / "a.faiss"), "--allow-folder")
    refused(imported(gallery, vectors, "--format", "csv"), "--format is one of npy")
    refused(imported("nowhere", vectors), "gallery_not_found", code=1)
    refused(imported(gallery, vectors, model="nobody"), "model_not_found", code=1)
    assert service.client.gallery(gallery)["items"] == 0


def test_what_only_the_service_refuses_is_named_by_its_row_in_the_file(service: Service, tmp_path: Path) -> None:
    gallery = service.gallery("cosine")
    zero = VECTORS.copy()
    zero[37] = 0
    np.save(tmp_path / "zero.npy", zero)
    done = imported(gallery, tmp_path / "zero.npy", "--batch", "10", model="cosine")
    refused(done, "zero.npy, row 37, item 7 of its request: ", "no direction", "invalid_vector")
    assert service.client.gallery(gallery)["items"] == 30, "what came before is stored, and noted"

    np.save(tmp_path / "zero.npy", VECTORS)
    refused(imported(gallery, tmp_path / "zero.npy", model="cosine"), "is of another import", "Remove it")
    (tmp_path / f"zero.npy.{gallery}.import.json").unlink()
    assert imported(gallery, tmp_path / "zero.npy", model="cosine").exit_code == 0
    service.check(gallery, [str(row) for row in range(ROWS)], "cosine")


def test_a_gallery_that_was_made_anew_gets_all_rows(service: Service, vectors: Path) -> None:
    gallery = service.gallery()
    state = vectors.with_name("state.json")
    bad = VECTORS.copy()
    bad[45] = np.inf
    np.save(vectors, bad)
    refused(imported(gallery, vectors, "--batch", "10", "--state", str(state)), "row 45: holds NaN, infinity")
    assert orjson.loads(state.read_bytes())["rows"] == 40
    service.client.delete_gallery(gallery)
    service.client.create_gallery(gallery, "old")
    refused(imported(gallery, vectors, "--state", str(state)), "state.json: is of another import")


# --- in pieces --------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> Rows:
    (embeddings,) = columns(path)
    return Rows(embeddings, DIMENSION)


def run_against(answers: list[int], rows: Rows, state: State) -> list[int]:
    """Run against a service that answers so; how many rows were told to be stored, each time."""
    told = list[int]()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/info":
            return httpx.Response(200, json={"limits": {"max_arrow_bytes": 1 << 20, "max_items_per_arrow": 20}})
        status = answers.pop(0)
        if not status:
            raise httpx.ConnectError("no")
        return httpx.Response(status, json={"status": status, "code": "test", "detail": "test"})

    with Client("http://service", transport=httpx.MockTransport(answer)) as client:
        loop.run(client, "photos", "old", rows, state, stored=told.append, pauses=(0.0, 0.0))
    assert not answers
    return told


def test_a_service_that_is_overloaded_or_away_for_a_while_is_asked_again(vectors: Path, tmp_path: Path) -> None:
    state = State(tmp_path / "state", "x")
    assert run_against([200, 429, 0, 200, 200], rows_of(vectors), state) == [0, 20, 40, 50]
    with pytest.raises(httpx.ConnectError):
        run_against([200, 0, 503, 0], rows_of(vectors), state)
    assert state.rows() == 20
    assert run_against([200, 200], rows_of(vectors), state) == [20, 40, 50]


class Small:
    """A service that takes so many bytes, whatever it says; it keeps the ids that it takes, request by request."""

    def __init__(self, takes: int, says: int) -> None:
        self._takes = takes
        self._says = says
        self.ids = list[list[str]]()
        self.sizes = list[int]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/info":
            return httpx.Response(200, json={"limits": {"max_arrow_bytes": self._says, "max_items_per_arrow": 1000}})
        self.sizes.append(len(request.content))
        if len(request.content) > self._takes:
            return httpx.Response(413, html="<h1>Too large</h1>")
        self.ids.append(pa.ipc.open_stream(request.content).read_all().column("id").to_pylist())
        return httpx.Response(200, json={})


def growing(folder: Path, *, last: int = 2000) -> Rows:
    """Rows whose payloads are small only at first."""
    count = 200
    np.save(folder / "vectors.npy", np.zeros((count, DIMENSION), np.float32))
    sizes = [2 if row < 100 else 2000 for row in range(count - 1)] + [last]
    (folder / "payloads.jsonl").write_text("".join(f'{{"t":"{"x" * size}"}}\n' for size in sizes))
    (embeddings,), (payloads,) = columns(folder / "vectors.npy"), columns(folder / "payloads.jsonl")
    return Rows(embeddings, DIMENSION, payloads=payloads)


def run_small(service: Small, rows: Rows, state: State) -> list[int]:
    told = list[int]()
    with Client("http://service", transport=httpx.MockTransport(service)) as client:
        loop.run(client, "photos", "old", rows, state, stored=told.append)
    return told


@pytest.mark.parametrize("says", [30_000, 1 << 30], ids=["the service", "something before it"])
def test_rows_that_are_larger_than_the_first_are_sent_in_smaller_requests(tmp_path: Path, says: int) -> None:
    service = Small(30_000, says)
    told = run_small(service, growing(tmp_path), State(tmp_path / "state", "x"))
    assert [each for request in service.ids for each in request] == [str(row) for row in range(200)]
    assert told == [0, *np.cumsum([len(request) for request in service.ids]).tolist()]
    refused = [size for size in service.sizes if size > 30_000]
    assert (refused == []) == (says == 30_000), "what is too large for the service is not sent to it"
    assert refused == sorted(refused, reverse=True), "no size is tried again that was refused"


@pytest.mark.parametrize(
    ("says", "limit"), [(30_000, "30000 that are taken (max_arrow_bytes"), (1 << 30, "(not_a_problem (413)")]
)
def test_a_row_that_is_too_large_by_itself_is_named_and_those_before_it_are_stored(
    tmp_path: Path, says: int, limit: str
) -> None:
    service, state = Small(30_000, says), State(tmp_path / "state", "x")
    with pytest.raises(BadInput, match=r"payloads.jsonl, row 199: has 9\d{4} bytes on its way") as caught:
        run_small(service, growing(tmp_path, last=90_000), state)
    assert limit in str(caught.value)
    assert state.rows() == 199


def test_long_ids_make_requests_of_fewer_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.zeros((50, DIMENSION), np.float32))
    (tmp_path / "ids.txt").write_text("\n".join(f"{row:0500}" for row in range(50)))
    (embeddings,), (ids,) = columns(tmp_path / "vectors.npy"), columns(tmp_path / "ids.txt")
    short = Rows(embeddings, DIMENSION).row_bytes()
    assert Rows(embeddings, DIMENSION, ids=ids, id_prefix="a/").row_bytes() >= short + 500
    assert Rows(embeddings, DIMENSION, id_prefix="a" * 100).row_bytes() == short + 100


@pytest.mark.parametrize(
    ("row_bytes", "wanted", "expected"),
    [
        (4, None, loop.REQUEST_ROWS),
        (1 << 20, None, 64),
        (1 << 40, None, 1),
        (4, 7, 7),
        (4, 10**9, 10**6),
        (1 << 20, 10**9, 921),
    ],
)
def test_a_request_has_as_many_rows_as_are_good_or_wanted_within_the_limits(
    row_bytes: int, wanted: int | None, expected: int
) -> None:
    limits = {"max_arrow_bytes": 1 << 30, "max_items_per_arrow": 1_000_000}
    assert loop.batch_rows(limits, row_bytes, wanted) == expected


def test_the_digest_of_a_source_knows_its_bytes_and_not_its_name(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(20 * BLOCK)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(content)
    other.write_bytes(content)
    assert digest([one], {"a": 1}) == digest([other], {"a": 1})
    assert digest([one], {"a": 1}) != digest([one], {"a": 2})
    for changed in (content + b"x", content[:-1], b"x" + content[1:], content[:-1] + b"x", content[::-1]):
        other.write_bytes(changed)
        assert digest([one], {}) != digest([other], {})


def test_a_state_that_cannot_be_written_is_told_with_the_option_that_helps(vectors: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere/state: cannot be written .* --state"):
        run_against([], rows_of(vectors), State(tmp_path / "nowhere" / "state", "x"))


@pytest.mark.parametrize("place", ["", "/proc/state"])
def test_a_place_where_no_state_can_be_kept_is_refused_before_anything_is_stored(
    service: Service, vectors: Path, place: str
) -> None:
    refused(imported(service.gallery(), vectors, "--state", place))
    assert service.gate.upserts == 0


def test_a_state_that_is_no_state_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"[]", b"{}", b'{"import": "x", "rows": "many"}', b'{"import": "y", "rows": 3}'):
        (tmp_path / "state").write_bytes(content)
        with pytest.raises(BadInput, match="of another import"):
            State(tmp_path / "state", "x").rows()
