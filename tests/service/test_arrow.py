"""Bulk upserts as Arrow IPC streams."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gallery.errors import LimitExceeded
from service.arrow import read_items
from service.arrow_sizes import decompressed_bytes
from service.errors import InvalidArrow
from tests.service.world import GALLERY, OLD, World, opened
from workers import memory

ITEMS = f"/galleries/{GALLERY}/items"
TYPE = {"content-type": "application/vnd.apache.arrow.stream"}

#: reads a stream in a process of its own, and tells what is left of it in memory
READ = """
import os, sys
from pathlib import Path
from benchmarks.processes import private
from service.arrow import read_items
from workers import memory

before = private(os.getpid())
read_items(Path(sys.argv[1]), model="old", max_items=100_000, max_bytes=1 << 30)
memory.give_back()
print(private(os.getpid()) - before)
"""


def fixed(vectors: Any, kind: Any = None) -> Any:
    """A fixed-size list column."""
    array = np.asarray(vectors, np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel(), kind or pa.float32()), array.shape[1])


def stream(columns: dict[str, Any], *, batches: int = 1, model: str | None = None, packed: str | None = None) -> bytes:
    """An IPC stream of a table, whose buffers may be compressed."""
    table = pa.table(columns)
    if model is not None:
        table = table.replace_schema_metadata({"model": model})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=packed)) as writer:
        writer.write_table(table, max_chunksize=max(1, len(table) // batches))
    return bytes(sink.getvalue())


def send(world: World, content: bytes, model: str | None = "old") -> Any:
    params = {} if model is None else {"model": model}
    return world.client.post(ITEMS, content=content, headers=TYPE, params=params)


@pytest.fixture
def vectors() -> Any:
    return np.random.default_rng(0).normal(size=(100, OLD)).astype(np.float32)


@pytest.mark.skipif(memory._trim is None, reason="this C library cannot be asked to give memory back")
def test_nothing_of_a_large_stream_stays_in_memory(tmp_path: Path) -> None:
    vectors = np.ones((100_000, 128), np.float32)
    (tmp_path / "it").write_bytes(
        stream({"id": pa.array([str(row) for row in range(100_000)]), "embedding": fixed(vectors)})
    )
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "it")], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < vectors.nbytes / 3


@pytest.mark.parametrize("kind", ["fixed", "list", "large_list", "float16", "float64"])
@pytest.mark.parametrize("batches", [1, 7])
def test_a_stream_is_written_like_json(empty: World, vectors: Any, kind: str, batches: int) -> None:
    empty.prepared()
    if kind == "float16":
        vectors = vectors.astype(np.float16)
    column = {
        "fixed": lambda: fixed(vectors),
        "list": lambda: pa.array(vectors.tolist(), pa.list_(pa.float32())),
        "large_list": lambda: pa.array(vectors.tolist(), pa.large_list(pa.float32())),
        "float16": lambda: pa.array(list(vectors), pa.list_(pa.float16())),
        "float64": lambda: fixed(vectors, pa.float64()),
    }[kind]()
    ids = [f"a-{at}" for at in range(100)]
    payload = [f'{{"at": {at}}}' if at % 2 else None for at in range(100)]
    content = stream({"id": ids, "embedding": column, "payload": payload}, batches=batches)
    assert send(empty, content).json() == {"upserted": 100, "version": 1}
    hit = empty.search(vectors[41].astype(np.float32), k=1, include=["payload"])["hits"][0]
    assert (hit["id"], hit["payload"]) == ("a-41", {"at": 41})
    assert empty.get(f"{ITEMS}/a-42")["payload"] is None


def test_the_model_may_stand_in_the_schema(empty: World, vectors: Any) -> None:
    empty.prepared()
    content = stream({"id": ["a"], "embedding": fixed(vectors[:1])}, model="old")
    assert send(empty, content, model=None).json()["upserted"] == 1
    bare = stream({"id": ["a"], "embedding": fixed(vectors[:1])})
    empty.refused(send(empty, bare, model=None), 422, "invalid_arrow")
    empty.refused(send(empty, bare, model="nobody"), 404, "model_not_found")


def test_side_information_may_be_null_and_payloads_structs(empty: World, vectors: Any) -> None:
    empty.model("old", OLD, side_information={"dimension": 2})
    empty.post("/galleries", {"name": GALLERY, "model": "old"})
    content = stream(
        {
            "id": ["a", "b", "c"],
            "embedding": fixed(vectors[:3]),
            "side_information": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2)),
            "payload": [{"n": 1, "s": "x"}, None, {"n": 2, "s": None}],
        }
    )
    assert send(empty, content).json()["upserted"] == 3
    read = [empty.get(f"{ITEMS}/{each}?include=vectors") for each in "abc"]
    assert [item["side_information"] for item in read] == [[1, 2], None, [3, 4]]
    assert [item["payload"] for item in read] == [{"n": 1, "s": "x"}, None, {"n": 2, "s": None}]


@pytest.mark.parametrize(
    "encode",
    [lambda texts: texts.dictionary_encode(), lambda texts: texts.cast(pa.string_view())],
    ids=["dictionary", "view"],
)
def test_ids_and_payloads_may_be_encoded(empty: World, vectors: Any, encode: Any) -> None:
    empty.prepared()
    ids, payload = pa.array(["a", "b", "c"]), pa.array(['{"n": 1}', None, '{"n": 1}'])
    content = stream({"id": encode(ids), "embedding": fixed(vectors[:3]), "payload": encode(payload)}, batches=3)
    assert send(empty, content).json()["upserted"] == 3
    assert [empty.get(f"{ITEMS}/{each}")["payload"] for each in "abc"] == [{"n": 1}, None, {"n": 1}]


def encoded(texts: int, size: int) -> Any:
    """One text, of so many bytes, that many rows share."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * texts, pa.int8()), pa.array([" " * size]))


def test_what_rows_share_counts_for_each_of_them(tmp_path: Path, vectors: Any) -> None:
    path = tmp_path / "bomb"
    many = np.resize(vectors, (1000, OLD)).astype(np.float32)
    ids = [str(row) for row in range(len(many))]
    path.write_bytes(stream({"id": ids, "embedding": fixed(many), "payload": encoded(len(many), 10_000)}))
    assert path.stat().st_size < 100_000
    with pytest.raises(LimitExceeded, match="may take 1000000 bytes"):
        read_items(path, model="old", max_items=1000, max_bytes=1_000_000)
    view = pa.array(["x" * 10_000] * len(many)).cast(pa.string_view())
    path.write_bytes(stream({"id": ids, "embedding": fixed(many), "payload": view}))
    with pytest.raises(LimitExceeded, match="may take 1000000 bytes"):
        read_items(path, model="old", max_items=1000, max_bytes=1_000_000)


@pytest.mark.parametrize("packed", ["zstd", "lz4"])
@pytest.mark.parametrize(
    "encode", [lambda text: text, lambda text: text.dictionary_encode()], ids=["plain", "dictionary"]
)
def test_what_would_be_too_large_is_not_decompressed(tmp_path: Path, vectors: Any, packed: str, encode: Any) -> None:
    path, payload = tmp_path / "bomb", encode(pa.array([" " * 100_000_000]))
    path.write_bytes(stream({"id": ["a"], "embedding": fixed(vectors[:1]), "payload": payload}, packed=packed))
    assert path.stat().st_size < 1_000_000
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(LimitExceeded, match="may take 1000000 bytes"):
            read_items(path, model="old", max_items=1000, max_bytes=1_000_000)
        assert (pool.max_memory() or 0) < 1_000_000
    finally:
        pa.set_memory_pool(before)


@pytest.mark.parametrize("packed", ["zstd", "lz4", None])
def test_a_stream_says_of_its_compressed_buffers_what_they_take(vectors: Any, packed: str | None) -> None:
    text = pa.array([str(row) * 100 for row in range(100)])
    content = stream({"id": text, "embedding": fixed(vectors)}, batches=4, packed=packed)
    taken = [batch.nbytes if packed else 0 for batch in pa.ipc.open_stream(content)]
    said = list(decompressed_bytes(pa.BufferReader(content)))[1:]  # the first message is the schema
    assert said == pytest.approx(taken, abs=64 * 4)  # buffers may be padded


@pytest.mark.parametrize("packed", ["zstd", "lz4"])
def test_a_stream_that_says_too_little_of_a_buffer_is_refused(tmp_path: Path, vectors: Any, packed: str) -> None:
    path, length = tmp_path / "bomb", 1_234_567
    content = stream({"id": ["a"], "embedding": fixed(vectors[:1]), "payload": pa.array([" " * length])}, packed=packed)
    said = content.rindex(length.to_bytes(8, "little"))
    path.write_bytes(content[:said] + (1000).to_bytes(8, "little") + content[said + 8 :])
    with pytest.raises(InvalidArrow, match="too small"):
        read_items(path, model="old", max_items=1000, max_bytes=1_000_000)


def test_columns_are_looked_at_before_anything_is_written_out(tmp_path: Path, vectors: Any) -> None:
    path = tmp_path / "bomb"
    columns = [pa.array(["a", "b"]), fixed(vectors[:2]), *[encoded(2, 10)] * 3]
    batch = pa.RecordBatch.from_arrays(columns, names=["id", "embedding", "payload", "payload", "payload"])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(InvalidArrow, match="there twice"):
        read_items(path, model="old", max_items=1000, max_bytes=1_000_000)


def test_a_struct_holds_nothing_that_its_rows_share(tmp_path: Path, vectors: Any) -> None:
    path = tmp_path / "bomb"
    payload = pa.StructArray.from_arrays([encoded(2, 10)], names=["text"])
    path.write_bytes(stream({"id": ["a", "b"], "embedding": fixed(vectors[:2]), "payload": payload}))
    with pytest.raises(InvalidArrow, match="write out dictionaries"):
        read_items(path, model="old", max_items=1000, max_bytes=1_000_000)


def test_a_payload_of_nulls_only_is_none(empty: World, vectors: Any) -> None:
    empty.prepared()
    content = stream({"id": ["a", "b"], "embedding": fixed(vectors[:2]), "payload": [None, None]})
    assert send(empty, content).json()["upserted"] == 2
    assert empty.get(f"{ITEMS}/a")["payload"] is None


def of_width(width: int, vectors: Any) -> bytes:
    """A stream whose schema says a width that no writer would; streams of two widths differ there first."""
    ids, wider = pa.array(["a", "b"][: len(vectors)], pa.string()), np.hstack([vectors, vectors[:, :1]])
    whole, other = (stream({"id": ids, "embedding": fixed(each)}) for each in (vectors, wider))
    at = next(at for at, (one, another) in enumerate(zip(whole, other, strict=False)) if one != another)
    return whole[:at] + width.to_bytes(4, "little", signed=True) + whole[at + 4 :]


def bad(vectors: Any) -> dict[str, tuple[bytes, str, str | None]]:
    good = {"id": ["a", "b"], "embedding": fixed(vectors[:2])}
    whole = stream(good)
    lists = pa.list_(pa.float32())
    nan = vectors[:2].copy()
    nan[1, 2] = np.nan
    return {
        "empty": (b"", "invalid_arrow", None),
        "noise": (b"noise" * 100, "invalid_arrow", None),
        "cut": (whole[: len(whole) // 2], "invalid_arrow", None),
        "two": (whole + whole, "invalid_arrow", None),
        "file": (b"ARROW1\0\0" + whole, "invalid_arrow", None),
        "no rows": (
            stream({"id": pa.array([], pa.string()), "embedding": fixed(vectors[:0])}),
            "invalid_item",
            "/items",
        ),
        "a negative width": (of_width(-1, vectors[:0]), "invalid_arrow", None),
        "a negative width of rows": (of_width(-1, vectors[:2]), "invalid_arrow", None),
        "no ids": (stream({"embedding": good["embedding"]}), "invalid_arrow", None),
        "more": (stream({**good, "colour": [1, 2]}), "invalid_arrow", None),
        "numbers as ids": (stream({**good, "id": [1, 2]}), "invalid_arrow", None),
        "encoded numbers as ids": (stream({**good, "id": pa.array([1, 2]).dictionary_encode()}), "invalid_arrow", None),
        "text as vectors": (stream({**good, "embedding": ["x", "y"]}), "invalid_arrow", None),
        "null ids": (stream({**good, "id": [None, None]}), "invalid_item", "/items/0/id"),
        "null id": (stream({**good, "id": ["a", None]}), "invalid_item", "/items/1/id"),
        "same id": (stream({**good, "id": ["a", "a"]}), "duplicate_id", "/items/1/id"),
        "null vector": (
            stream({**good, "embedding": pa.array([[1.0] * OLD, None], lists)}),
            "invalid_vector",
            "/items/1/embedding",
        ),
        "null number": (
            stream({**good, "embedding": pa.array([[1.0] * OLD, [1.0, None, 1.0, 1.0]], lists)}),
            "invalid_vector",
            "/items/1/embedding",
        ),
        "nan": (stream({**good, "embedding": fixed(nan)}), "invalid_vector", "/items/1/embedding"),
        "width": (stream({**good, "embedding": fixed(vectors[:2, :3])}), "dimension_mismatch", "/items/0/embedding"),
        "widths": (
            stream({**good, "embedding": pa.array([[1.0] * OLD, [1.0]], lists)}),
            "dimension_mismatch",
            "/items/1/embedding",
        ),
        "no json": (stream({**good, "payload": ["{}", "{"]}), "invalid_item", "/items/1/payload"),
        "json list": (stream({**good, "payload": ["{}", "[]"]}), "invalid_item", "/items/1/payload"),
        "deep": (
            stream({**good, "payload": ["{}", '{"a":' * 65 + "1" + "}" * 65]}),
            "invalid_item",
            "/items/1/payload",
        ),
        "struct with nan": (
            stream({**good, "payload": [{"x": [1.0]}, {"x": [2.0, np.nan]}]}),
            "invalid_item",
            "/items/1/payload",
        ),
        "struct with a name that is no text": (
            stream({**good, "payload": [{"title": 1}, None]}).replace(b"title", b"t\xfftle"),
            "invalid_item",
            "/items/0/payload",
        ),
        "struct of no rows with a name that is no text": (
            stream(
                {
                    "id": pa.array([], pa.string()),
                    "embedding": fixed(vectors[:0]),
                    "payload": pa.array([], pa.struct([("title", pa.int8())])),
                }
            ).replace(b"title", b"t\xfftle"),
            "invalid_arrow",
            None,
        ),
        **{
            f"struct with a moment of {kind}": (
                stream({**good, "payload": pa.StructArray.from_arrays([pa.array([0, moment], kind)], ["when"])}),
                "invalid_item",
                "/items/1/payload",
            )
            for kind, moment in ((pa.timestamp("ns"), 1), (pa.timestamp("s"), 1 << 60), (pa.date32(), (1 << 31) - 1))
        },
        "bytes": (stream({**good, "payload": [{"x": b"\xff"}, None]}), "invalid_item", "/items/0/payload"),
    }


@pytest.mark.parametrize("name", bad(np.ones((2, OLD), np.float32)))
def test_a_bad_stream_is_refused_and_changes_nothing(empty: World, vectors: Any, name: str) -> None:
    empty.prepared()
    before = empty.everything()
    content, code, pointer = bad(vectors)[name]
    problem = empty.refused(send(empty, content), 422, code)
    assert problem["errors"][0]["pointer"] == (pointer or "")
    if (at := (pointer or "").removeprefix("/items/")[:1]) in ("0", "1") and "id" not in name:
        assert problem["item"] == "ab"[int(at)]
    assert empty.everything() == before


def test_offsets_that_lead_elsewhere_are_not_followed(empty: World, vectors: Any) -> None:
    """Every byte of a small stream is changed once: it is refused or written, and nothing crashes."""
    empty.prepared()
    whole = stream({"id": ["ab", "cd"], "embedding": pa.array(vectors[:2].tolist(), pa.list_(pa.float32()))})
    for at in range(0, len(whole), 11):
        changed = bytearray(whole)
        changed[at] ^= 0xFF
        assert send(empty, bytes(changed)).status_code in (200, 422)


def test_limits_of_a_stream_are_held_and_named(tmp_path: Path, vectors: Any) -> None:
    with opened(tmp_path, gallery={"max_items_per_arrow": 99}, max_arrow_bytes=10_000) as world:
        world.prepared()
        ids = [str(at) for at in range(100)]
        problem = world.refused(send(world, stream({"id": ids, "embedding": fixed(vectors)})), 422, "limit_exceeded")
        assert problem["limit"] == "max_items_per_arrow"
        problem = world.refused(send(world, b"x" * 10_001), 413, "body_too_large")
        assert problem["limit"] == "max_arrow_bytes"
        # Compressed buffers that swell are counted as they are in memory.
        table = pa.table({"id": ["a"], "embedding": fixed(np.zeros((1, 8192)))})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
        problem = world.refused(send(world, bytes(sink.getvalue())), 422, "limit_exceeded")
        assert problem["limit"] == "max_arrow_bytes"
        # So is a text that many rows share.
        shared = pa.DictionaryArray.from_arrays(
            pa.array([0] * 99, pa.int32()), pa.array(['{"a": "%s"}' % ("x" * 1000)])
        )
        content = stream({"id": ids[:99], "embedding": fixed(vectors[:99]), "payload": shared})
        assert len(content) < 10_000
        assert world.refused(send(world, content), 422, "limit_exceeded")["limit"] == "max_arrow_bytes"


def test_a_stream_and_a_parameter_that_name_different_models_are_refused(empty: World, vectors: Any) -> None:
    empty.prepared()
    columns = {"id": ["a"], "embedding": fixed(vectors[:1])}
    problem = empty.refused(send(empty, stream(columns, model="new"), "old"), 422, "invalid_arrow")
    assert "the query parameter `model` says old, and the schema's metadata new" in problem["detail"]
    assert send(empty, stream(columns, model="old"), "old").json()["upserted"] == 1
