"""Every format gives the rows that were written, from any row on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardfill.importing import faiss_child
from forwardfill.importing.column import BadInput
from forwardfill.importing.formats import columns, pick
from forwardfill.importing.rows import Rows, payload, texts

ROWS, DIMENSION = 97, 3
VECTORS = np.random.default_rng(0).integers(-99, 99, (ROWS, DIMENSION)).astype(np.float32)
IDS = [f"item {row}" for row in range(ROWS)]


def table(kind: Any = None) -> Any:
    lists = pa.array(VECTORS.tolist(), kind or pa.list_(pa.float64()))
    return pa.table({"id": IDS, "other": list(range(ROWS)), "embedding": lists})


def npy(path: Path) -> None:
    np.save(path, VECTORS)


def npy_by_columns_of_big_float64(path: Path) -> None:
    np.save(path, np.asfortranarray(VECTORS.astype(">f8")))


def parquet(path: Path) -> None:
    pq.write_table(table(), path, row_group_size=20)


def parquet_fixed_float16(path: Path) -> None:
    pq.write_table(table(pa.list_(pa.float16(), DIMENSION)), path, row_group_size=ROWS)


def grouped(path: Path, groups: list[int]) -> None:
    """A column that counts the rows, in groups of these sizes."""
    rows = iter(range(sum(groups)))
    with pq.ParquetWriter(path, pa.schema([("row", pa.int64())])) as writer:
        for size in groups:
            writer.write_table(pa.table({"row": pa.array([next(rows) for _ in range(size)], pa.int64())}))


def arrow_file(path: Path) -> None:
    with pa.ipc.new_file(path, table().schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table(), max_chunksize=20)


def arrow_stream(path: Path) -> None:
    with pa.ipc.new_stream(path, table().schema) as writer:
        writer.write_table(table(), max_chunksize=7)


def fvecs(path: Path) -> None:
    rows = np.zeros(ROWS, [("dimension", "<i4"), ("vector", "<f4", (DIMENSION,))])
    rows["dimension"], rows["vector"] = DIMENSION, VECTORS
    rows.tofile(path)


def hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["embedding"] = VECTORS
        file["id"] = IDS
        file["test"] = VECTORS[:5]


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.npy": npy,
    "b.npy": npy_by_columns_of_big_float64,
    "a.parquet": parquet,
    "b.parquet": parquet_fixed_float16,
    "a.arrow": arrow_file,
    "b.arrow": arrow_stream,
    "a.fvecs": fvecs,
    "a.hdf5": hdf5,
}


def of(path: Path, **options: Any) -> Rows:
    found = columns(path)
    ids = [each for each in found if each.name == "id"]
    embeddings = pick(found, None, "embedding", vectors=True, path=path, option="--column")
    return Rows(embeddings, DIMENSION, ids=ids[0] if ids else None, **options)


def everything(rows: Rows, start: int, size: int) -> tuple[list[str], Any]:
    """The ids and vectors that would be sent, after a look at the length of each batch."""
    batches = list(rows.batches(start, size))
    assert [len(each) for each in batches[:-1]] == [size] * (len(batches) - 1)
    joined = pa.Table.from_batches(batches)
    assert joined.schema.field("embedding").type == pa.list_(pa.float32(), DIMENSION)
    return joined.column("id").to_pylist(), np.array(joined.column("embedding").to_pylist())


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(("start", "size"), [(0, ROWS), (0, 10), (45, 13), (ROWS - 1, 10)])
def test_a_format_gives_the_rows_that_were_written_from_any_row_on(
    tmp_path: Path, name: str, start: int, size: int
) -> None:
    WRITERS[name](tmp_path / name)
    rows = of(tmp_path / name)
    assert len(rows) == ROWS
    ids, vectors = everything(rows, start, size)
    assert ids == (IDS if rows.ids else [str(row) for row in range(ROWS)])[start:]
    assert np.array_equal(vectors, VECTORS[start:])


@given(groups=st.lists(st.integers(0, 9), max_size=6).filter(any), size=st.integers(1, 20), data=st.data())
def test_parquet_gives_the_rows_from_any_row_on_whatever_the_sizes_of_its_groups(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], size: int, data: st.DataObject
) -> None:
    path, rows = tmp_path_factory.mktemp("groups") / "a.parquet", sum(groups)
    grouped(path, groups)
    start = data.draw(st.integers(0, rows), "start")
    (column,) = columns(path)
    assert [each for block in column.blocks(start, size) for each in block.to_pylist()] == list(range(start, rows))


@pytest.mark.parametrize("groups", [[10, 1, 10], [10, 10, 3]], ids=["a small one between", "a small one last"])
def test_parquet_gives_the_rows_from_each_row_on_where_a_group_is_small(tmp_path: Path, groups: list[int]) -> None:
    grouped(tmp_path / "a.parquet", groups)
    (column,) = columns(tmp_path / "a.parquet")
    for start in range(sum(groups) + 1):
        found = [each for block in column.blocks(start, 4) for each in block.to_pylist()]
        assert found == list(range(start, sum(groups)))


def test_bytes_become_floats(tmp_path: Path) -> None:
    rows = np.zeros(5, [("dimension", "<i4"), ("vector", "u1", (DIMENSION,))])
    rows["dimension"], rows["vector"] = DIMENSION, np.arange(5)[:, None] + 251
    rows.tofile(tmp_path / "a.bvecs")
    _, vectors = everything(of(tmp_path / "a.bvecs"), 1, 2)
    assert vectors.tolist() == [[each] * DIMENSION for each in (252, 253, 254, 255)]


def test_ids_are_lines_or_numbers_with_a_prefix(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("\n".join(IDS))
    np.save(tmp_path / "ids.npy", np.arange(ROWS) * 2)
    npy(tmp_path / "a.npy")
    (embeddings,) = columns(tmp_path / "a.npy")
    for name, expected in (("ids.txt", IDS), ("ids.npy", [str(2 * row) for row in range(ROWS)])):
        (ids,) = columns(tmp_path / name)
        found, _ = everything(Rows(embeddings, DIMENSION, ids=ids, id_prefix="x/"), 30, 20)
        assert found == [f"x/{each}" for each in expected[30:]]


def as_npy(folder: Path, values: Any) -> Path:
    np.save(folder / "ids.npy", values)
    return folder / "ids.npy"


def as_hdf5(folder: Path, values: Any) -> Path:
    with h5py.File(folder / "ids.h5", "w") as file:
        file["id"] = values
    return folder / "ids.h5"


def as_parquet(folder: Path, values: Any) -> Path:
    pq.write_table(pa.table({"id": pa.array(values)}), folder / "ids.parquet")
    return folder / "ids.parquet"


def as_arrow_stream(folder: Path, values: Any) -> Path:
    table = pa.table({"id": pa.array(values)})
    with pa.ipc.new_stream(folder / "ids.arrow", table.schema) as writer:
        writer.write_table(table)
    return folder / "ids.arrow"


def ids_in(path: Path, start: int = 0, size: int = 2) -> list[str]:
    (column,) = columns(path)
    blocks = zip(itertools.count(start, size), column.blocks(start, size), strict=False)
    return [each for at, block in blocks for each in texts(block, "", column, at).to_pylist()]


@pytest.mark.parametrize("write", [as_npy, as_hdf5, as_parquet, as_arrow_stream])
@pytest.mark.parametrize("kind", ["u8", ">u8", "i8", ">i2", "u1"])
def test_integers_of_any_width_are_ids(tmp_path: Path, write: Callable[[Path, Any], Path], kind: str) -> None:
    limits = np.iinfo(kind)
    values = np.array([1, limits.max, limits.min, limits.max - 7, 3], kind)
    path = write(tmp_path, values if write in (as_npy, as_hdf5) else values.astype(values.dtype.newbyteorder("=")))
    for start in range(len(values)):
        assert ids_in(path, start) == [str(each) for each in values.tolist()[start:]]


@pytest.mark.parametrize("write", [as_npy, as_hdf5, as_parquet, as_arrow_stream])
def test_byte_strings_are_ids_in_utf_8(tmp_path: Path, write: Callable[[Path, Any], Path]) -> None:
    values = np.array([each.encode() for each in ("a", "bé", "c", "d", "ü")])
    assert ids_in(write(tmp_path, values), 1) == ["bé", "c", "d", "ü"]
    values[3] = b"\xe9"
    said = "cannot be read from row 2 on" if write is as_hdf5 else "row 3: its id is not text in UTF-8"
    with pytest.raises(BadInput, match=said):
        ids_in(write(tmp_path, values))


def test_bytes_that_other_rows_share_are_blamed_on_the_row_that_has_them(tmp_path: Path) -> None:
    path = as_arrow_stream(tmp_path, pa.array([b"a", b"b", b"c", b"\xe9"]).dictionary_encode())
    with pytest.raises(BadInput, match="column 'id', row 3: its id is not text in UTF-8"):
        ids_in(path)


@pytest.mark.parametrize(("write", "shared"), [(as_parquet, False), (as_arrow_stream, False), (as_arrow_stream, True)])
def test_texts_are_ids_and_payloads_whichever_way_they_are_kept(
    tmp_path: Path, write: Callable[[Path, Any], Path], shared: bool
) -> None:
    given = ["a longer one than a view itself holds", "b", None, "d", "b"]
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        values = pa.array(given, kind)
        (column,) = columns(write(tmp_path, values.dictionary_encode() if shared else values))
        (block,) = column.blocks(0, 9)
        assert payload(block, column).to_pylist() == given
        assert texts(block.slice(3), "", column, 3).to_pylist() == given[3:]
        with pytest.raises(BadInput, match="row 2: has no id"):
            texts(block.slice(1), "", column, 1)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("\r\n".join(IDS), encoding="utf-8-sig")
    (column,) = columns(tmp_path / "ids.txt")
    for start in (0, 1):
        assert [each for block in column.blocks(start, 10) for each in block.to_pylist()] == IDS[start:]


def test_a_row_may_lack_side_information_and_payload(tmp_path: Path) -> None:
    side = pa.array([[1.0, 2.0], None, [5.0, 6.0]], pa.list_(pa.float64()))
    vectors = pa.array(VECTORS[:3].tolist())
    pq.write_table(pa.table({"embedding": vectors, "side": side}), tmp_path / "a.parquet")
    (tmp_path / "payloads.jsonl").write_text('{"a": 1}\n\n{"a": 3}\n')
    embeddings, beside = columns(tmp_path / "a.parquet")
    (payloads,) = columns(tmp_path / "payloads.jsonl")
    rows = Rows(embeddings, DIMENSION, side=beside, side_dimension=2, payloads=payloads)
    (batch,) = rows.batches(0, 10)
    assert batch.column("side_information").to_pylist() == side.to_pylist()
    assert batch.column("payload").to_pylist() == ['{"a": 1}', None, '{"a": 3}']


def test_a_whole_block_may_lack_side_information(tmp_path: Path) -> None:
    side = pa.array([None, None, [5.0, 6.0]], pa.list_(pa.float32()))
    table = pa.table({"embedding": VECTORS[:3].tolist(), "side": side})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    embeddings, beside = columns(tmp_path / "a.arrow")
    rows = Rows(embeddings, DIMENSION, side=beside, side_dimension=2)
    found = pa.Table.from_batches(rows.batches(0, 2))
    assert found.column("side_information").to_pylist() == side.to_pylist()


# --- FAISS ------------------------------------------------------------------------------------------------------------


def flat() -> Any:
    return faiss.IndexFlatIP(DIMENSION)


def hnsw() -> Any:
    return faiss.IndexHNSWFlat(DIMENSION, 4)


def ivf() -> Any:
    index = faiss.index_factory(DIMENSION, "IVF5,Flat")
    index.cp.min_points_per_centroid = 1
    index.train(VECTORS)
    return index


def test_what_an_index_keeps_is_what_was_added_under_the_ids_it_was_added_with() -> None:
    given = np.random.default_rng(1).permutation(1000)[:ROWS]
    for make, renamed in ((flat, False), (hnsw, False), (flat, True), (hnsw, True), (ivf, True), (ivf, False)):
        inner = make()
        index = faiss.IndexIDMap(inner) if renamed else inner
        named = renamed or make is ivf
        index.add_with_ids(VECTORS, given) if named else index.add(VECTORS)
        kept = faiss_child.kept(faiss, index)
        assert kept.count == ROWS
        ids = np.concatenate([kept.ids(at, min(at + 9, ROWS)) for at in range(0, ROWS, 9)])
        vectors = np.concatenate([kept.vectors(at, min(at + 9, ROWS)) for at in range(0, ROWS, 9)])
        expected = dict(zip((given if named else np.arange(ROWS)).tolist(), VECTORS.tolist(), strict=True))
        assert dict(zip(ids.tolist(), vectors.tolist(), strict=True)) == expected


def test_an_index_that_keeps_codes_is_refused() -> None:
    index = faiss.index_factory(DIMENSION, "SQ8")
    index.train(VECTORS)
    index.add(VECTORS)
    with pytest.raises(SystemExit, match="IndexScalarQuantizer does not keep vectors as they were added"):
        faiss_child.kept(faiss, index)


def test_an_index_whose_lists_are_in_another_file_is_refused(tmp_path: Path) -> None:
    index = ivf()
    lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(tmp_path / "lists"))
    index.replace_invlists(lists, False)
    index.add(VECTORS)
    with pytest.raises(SystemExit, match="its lists are in another file"):
        faiss_child.kept(faiss, index)


@pytest.mark.parametrize("way", ["external", "virtual"])
def test_a_dataset_that_lies_in_other_files_is_refused(tmp_path: Path, way: str) -> None:
    path, private = tmp_path / "a.h5", tmp_path / "private"
    with h5py.File(private, "w") as file:
        file["x"] = VECTORS
    with h5py.File(path, "w") as file:
        if way == "external":
            file.create_dataset("x", VECTORS.shape, "u1", external=[(str(private), 0, VECTORS.size)])
        else:
            layout = h5py.VirtualLayout(VECTORS.shape, VECTORS.dtype)
            layout[:] = h5py.VirtualSource(str(private), "x", VECTORS.shape)
            file.create_virtual_dataset("x", layout)
    with pytest.raises(BadInput, match="it lies in other files"):
        everything(of(path), 0, ROWS)


def test_an_index_file_is_read_by_a_child_from_an_allowed_folder_only(tmp_path: Path) -> None:
    index, path = ivf(), tmp_path / "in" / "a.faiss"
    path.parent.mkdir()
    (tmp_path / "out").mkdir()
    index.add_with_ids(VECTORS, np.arange(ROWS) + 1000)
    faiss.write_index(index, str(path))
    (tmp_path / "out" / "a.faiss").symlink_to(path)
    for allowed, found in ((None, path), (tmp_path / "out", path), (tmp_path / "out", tmp_path / "out" / "a.faiss")):
        with pytest.raises(BadInput, match="--allow-folder"):
            columns(found, allowed=allowed)
    ids, embeddings = columns(path, allowed=path.parent)
    found_ids, vectors = everything(Rows(embeddings, DIMENSION, ids=ids), 0, 40)
    order = [int(each) - 1000 for each in found_ids]
    assert sorted(order) == list(range(ROWS))
    assert np.array_equal(vectors, VECTORS[order])


@pytest.mark.parametrize("damage", ["cut off", "more rows than bytes", "another format"])
def test_a_damaged_index_file_is_refused_and_named(tmp_path: Path, damage: str) -> None:
    index, path = flat(), tmp_path / "a.faiss"
    index.add(VECTORS)
    faiss.write_index(index, str(path))
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut off": content[:-5],
            "more rows than bytes": content.replace(ROWS.to_bytes(8, "little"), (ROWS << 40).to_bytes(8, "little")),
            "another format": b"anything else",
        }[damage]
    )
    with pytest.raises(BadInput, match=r"a\.faiss: "):
        columns(path, allowed=tmp_path)


def test_the_format_of_a_file_may_be_told_whatever_its_name(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name)
        (tmp_path / name).rename(tmp_path / "data")
        kind = {".fvecs": "fvecs", ".hdf5": "hdf5"}.get(Path(name).suffix, Path(name).suffix[1:])
        embeddings = pick(
            columns(tmp_path / "data", kind=kind), None, "embedding", vectors=True, path=tmp_path, option=""
        )
        _, vectors = everything(Rows(embeddings, DIMENSION), 0, ROWS)
        assert np.array_equal(vectors, VECTORS)


# --- what is refused --------------------------------------------------------------------------------------------------


def rewritten(rows: int, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda path: np.save(path, change(VECTORS[:rows].copy()))


def pickled(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)


def a_cut_file(path: Path) -> None:
    fvecs(path)
    path.write_bytes(path.read_bytes()[:-1])


def another_dimension(path: Path) -> None:
    fvecs(path)
    content = bytearray(path.read_bytes())
    content[16 * 7] = 2
    path.write_bytes(content)


def ragged(path: Path) -> None:
    pq.write_table(pa.table({"embedding": [[1.0, 2.0, 3.0], [1.0, 2.0]]}), path)


def a_null(path: Path) -> None:
    pq.write_table(pa.table({"embedding": [[1.0, 2.0, 3.0], [1.0, None, 3.0]]}), path)


def no_vector(path: Path) -> None:
    pq.write_table(pa.table({"embedding": [[1.0, 2.0, 3.0], None]}), path)


def no_id(path: Path) -> None:
    pq.write_table(pa.table({"id": ["a", None], "embedding": VECTORS[:2].tolist()}), path)


def ids_of_floats(path: Path) -> None:
    pq.write_table(pa.table({"id": [1.0, 2.0], "embedding": VECTORS[:2].tolist()}), path)


def two_columns(path: Path) -> None:
    pq.write_table(pa.table({"a": VECTORS[:2].tolist(), "b": VECTORS[:2].tolist()}), path)


def nan(vectors: Any) -> Any:
    vectors[50, 1] = np.nan
    return vectors


def head_of_npy(shape: bytes) -> Callable[[Path], None]:
    """An array whose head says another shape than it has."""

    def write(path: Path) -> None:
        npy(path)
        head, cut, rest = path.read_bytes().partition(b"(97, 3), }")
        path.write_bytes(head + (shape + b", }").ljust(len(cut)) + rest[max(0, len(shape) + 3 - len(cut)) :])

    return write


def a_damaged_group(path: Path) -> None:
    hdf5(path)
    path.write_bytes(path.read_bytes().replace(b"SNOD", b"SN0D"))


def a_name_that_is_no_text(path: Path) -> None:
    arrow_stream(path)
    path.write_bytes(path.read_bytes().replace(b"other", b"oth\xffr"))


def two_arrays(path: Path) -> None:
    npy(path)
    path.write_bytes(path.read_bytes() * 2)


def two_streams(path: Path) -> None:
    arrow_stream(path)
    path.write_bytes(path.read_bytes() * 2)


BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a NaN": ("a.npy", rewritten(ROWS, nan), r"a\.npy, row 50: holds NaN"),
    "beyond float32": ("a.npy", lambda path: np.save(path, VECTORS.astype("f8") * 1e300), r"row \d: .*beyond float32"),
    "another dimension": ("a.npy", rewritten(9, lambda v: v[:, :2]), r"row 0: has dimension 2, the model 3"),
    "no rows": ("a.npy", rewritten(0, lambda v: v), "has no rows"),
    "three axes": ("a.npy", rewritten(9, lambda v: v[None]), r"shape \(1, 9, 3\)"),
    "two arrays": ("a.npy", two_arrays, "bytes follow its array"),
    "pickled objects": ("a.npy", pickled, "pickled objects are refused"),
    "a cut file": ("a.fvecs", a_cut_file, "cut off"),
    "another dimension later": ("a.fvecs", another_dimension, r"a\.fvecs, row 7: its dimension is 2"),
    "ragged": ("a.parquet", ragged, r"column 'embedding', row 1: has dimension 2"),
    "a null number": ("a.parquet", a_null, r"column 'embedding', row 1: holds NaN, infinity, a null"),
    "no vector": ("a.parquet", no_vector, r"column 'embedding', row 1: has no vector"),
    "no id": ("a.parquet", no_id, r"column 'id', row 1: has no id"),
    "ids of floats": ("a.parquet", ids_of_floats, r"column 'id': ids are strings or integers, not double"),
    "two candidates": ("a.parquet", two_columns, r"--column: 'a', 'b'"),
    "not parquet": ("a.parquet", fvecs, "not a Parquet file"),
    "not arrow": ("a.arrow", lambda path: path.write_bytes(b"x" * 99), "not an Arrow IPC file or stream"),
    "two streams": ("a.arrow", two_streams, "bytes follow the end of its Arrow stream"),
    "not hdf5": ("a.h5", lambda path: path.write_bytes(b"x" * 99), "not an HDF5 file"),
    "an endless head": ("a.npy", head_of_npy(b"((((((((("), "not a plain array|cannot be read"),
    "more rows than there can be": (
        "a.npy",
        head_of_npy(b"(9999999999999999999, 3)"),
        "not a plain array|cannot be read",
    ),
    "a damaged group": ("a.h5", a_damaged_group, "cannot be read"),
    "a name that is no text": ("a.arrow", a_name_that_is_no_text, "cannot be read"),
    "no suffix": ("a", lambda path: path.write_bytes(b"x"), "--format"),
    "nothing": ("a.npy", lambda path: None, "there is no such file"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named_by_file_row_and_column(tmp_path: Path, bad: str) -> None:
    name, write, said = BAD[bad]
    write(tmp_path / name)
    with pytest.raises(BadInput, match=said) as refused:
        everything(of(tmp_path / name), 0, 20)
    assert str(tmp_path / name) in str(refused.value)


def test_columns_of_different_lengths_are_refused(tmp_path: Path) -> None:
    npy(tmp_path / "a.npy")
    (tmp_path / "ids.txt").write_text("a\nb\n")
    (embeddings,), (ids,) = columns(tmp_path / "a.npy"), columns(tmp_path / "ids.txt")
    with pytest.raises(BadInput, match=r"ids\.txt has 2 rows, but .*a\.npy has 97"):
        Rows(embeddings, DIMENSION, ids=ids)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("a\nb\nc\n")
    (ids,) = columns(path)
    path.write_text("a\n")
    with pytest.raises(BadInput, match="said to have 3 rows"):
        list(ids.blocks(0, 2))
