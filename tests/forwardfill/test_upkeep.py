"""`forwardfill verify` finds what is wrong with stored data and names it; `forwardfill gc` finds what nothing needs."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import delete, event, select, update
from typer.testing import CliRunner

from forwardfill import upkeep
from forwardfill.cli import app
from gallery import verify as checks
from gallery.catalog.tables import ArtifactRow, Base, ColumnRow, ItemRow, SegmentRow
from gallery.files import Files, digest
from gallery.index.registry import backend
from gallery.removal import delete_gallery
from gallery.spaces import Space
from gallery.transforms import artifact_file
from gallery.upgrade.states import State
from tests.gallery.world import GALLERY, WITH_SIDE, World
from tests.service.world import opened


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """An upgraded gallery: two segments, the first with index files, in two models."""
    monkeypatch.setenv("FORWARDFILL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FORWARDFILL_ORPHAN_SECONDS", "3600")
    monkeypatch.setenv("FORWARDFILL_EXACT_BELOW", "20")
    monkeypatch.setenv("COLUMNS", "200")
    opened = World.open(tmp_path / "data", exact_below=20).prepare(
        ("forward", "old", "new", WITH_SIDE), index={"kind": "hnsw"}
    )
    random = np.random.default_rng(0)
    for first, rows in ((0, 100), (100, 5)):
        ids = [f"i{first + row}" for row in range(rows)]
        opened.upsert("old", ids, random.normal(size=(rows, 4)), side=random.normal(size=(rows, 2)))
    upgrade = opened.start()
    assert opened.run(upgrade) is State.COMPLETED
    opened.delete("i3", "i101")
    yield opened
    opened.close()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def column(world: World, index: bool = True) -> ColumnRow:
    """A column of the new model, with or without an index."""
    with world.store.catalog.reading() as session:
        wanted = ColumnRow.index_file.is_not(None) if index else ColumnRow.index_file.is_(None)
        return session.scalars(select(ColumnRow).where(ColumnRow.origin == "derived", wanted)).one()


def change(world: World, statement: Any) -> None:
    with world.store.catalog.transaction() as tx:
        tx.session.execute(statement)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def a_changed_byte(world: World) -> tuple[str, ...]:
    row = column(world)
    flip(world.store.files.path(row.file))
    return GALLERY, f"segment {row.segment_id}", row.file, "SHA-256"


def a_missing_index(world: World) -> tuple[str, ...]:
    row = column(world)
    world.store.files.remove([row.index_file or ""])
    return GALLERY, f"segment {row.segment_id}", row.index_file or "", "missing"


def a_file_that_cannot_be_read(world: World) -> tuple[str, ...]:
    """As where another user owns it, but root may read that."""
    row = column(world)
    path = world.store.files.path(row.file)
    path.unlink()
    path.mkdir()
    return GALLERY, f"segment {row.segment_id}", row.file, "cannot be read: IsADirectoryError"


def a_changed_artifact(world: World) -> tuple[str, ...]:
    with world.store.catalog.reading() as session:
        name = artifact_file(session.scalars(select(ArtifactRow.sha256)).one())
    flip(world.store.files.path(name))
    return "(artifacts)", name


def two_items_that_changed_places(world: World) -> tuple[str, ...]:
    """All counts are as they were."""
    for row, item in ((1, "other"), (2, "i1"), (1, "i2")):
        change(world, update(ItemRow).where(ItemRow.segment_id == 1, ItemRow.row == row).values(item_id=item))
    return GALLERY, "segment 1", "row 1 is 'i2' in the catalog and 'i1' in the file"


def a_row_without_an_item(world: World) -> tuple[str, ...]:
    change(world, delete(ItemRow).where(ItemRow.segment_id == 2, ItemRow.row == 4))
    return GALLERY, "segment 2", "row 4 ('i104') has no item"


def an_item_beyond_the_rows(world: World) -> tuple[str, ...]:
    change(world, update(ItemRow).where(ItemRow.segment_id == 2, ItemRow.row == 4).values(row=9))
    return GALLERY, "segment 2", "'i104' is in row 9 of 5"


def a_deletion_that_is_yet_to_come(world: World) -> tuple[str, ...]:
    change(world, update(ItemRow).where(ItemRow.segment_id == 1, ItemRow.row == 3).values(deleted_version=999))
    return GALLERY, "segment 1", "row 3 ('i3')", "version 999"


def deleted_rows_that_are_counted_wrong(world: World) -> tuple[str, ...]:
    change(world, update(SegmentRow).where(SegmentRow.id == 1).values(dead=SegmentRow.dead + 1))
    return GALLERY, "segment 1", "of its rows are said to be deleted, and"


def a_column_that_denies_its_maker(world: World) -> tuple[str, ...]:
    row = column(world, index=False)
    change(world, update(ColumnRow).where(ColumnRow.id == row.id).values(origin="native"))
    return GALLERY, f"segment {row.segment_id}", row.file, "its transformation denies"


def a_column_that_forgot_where_it_came_from(world: World) -> tuple[str, ...]:
    row = column(world, index=False)
    change(world, update(ColumnRow).where(ColumnRow.id == row.id).values(lineage=[]))
    return GALLERY, f"segment {row.segment_id}", row.file, "its lineage denies"


def a_segment_without_columns(world: World) -> tuple[str, ...]:
    change(world, update(ColumnRow).where(ColumnRow.segment_id == 2).values(published=False))
    return GALLERY, "segment 2", "no column"


def a_vector_that_is_no_number(world: World) -> tuple[str, ...]:
    """Its digest is right: it was written like this."""
    row = column(world, index=False)
    path = world.store.files.path(row.file)
    vectors = np.load(path)
    vectors[2, 1] = np.nan
    np.save(path, vectors)
    change(world, update(ColumnRow).where(ColumnRow.id == row.id).values(sha256=digest(path)))
    return GALLERY, f"segment {row.segment_id}", row.file, "row 2"


def an_index_of_other_vectors(world: World) -> tuple[str, ...]:
    """Its digest is right, and so is its size."""
    row = column(world)
    path = world.store.files.path(row.index_file or "")
    vectors = np.random.default_rng(9).normal(size=(100, 5)).astype(np.float32)
    path.unlink()
    backend("hnsw").build(vectors, space=Space(5, "euclidean"), path=path, parameters=row.index_parameters)
    change(world, update(ColumnRow).where(ColumnRow.id == row.id).values(index_sha256=digest(path)))
    return GALLERY, f"segment {row.segment_id}", row.index_file or "", "neighbours"


DAMAGES: list[Callable[[World], tuple[str, ...]]] = [
    a_changed_byte,
    a_missing_index,
    a_file_that_cannot_be_read,
    a_changed_artifact,
    two_items_that_changed_places,
    a_row_without_an_item,
    an_item_beyond_the_rows,
    a_deletion_that_is_yet_to_come,
    deleted_rows_that_are_counted_wrong,
    a_column_that_denies_its_maker,
    a_column_that_forgot_where_it_came_from,
    a_segment_without_columns,
    a_vector_that_is_no_number,
    an_index_of_other_vectors,
]


def test_what_is_whole_verifies_before_and_after_a_merge(world: World) -> None:
    whole = run("verify")
    assert whole.exit_code == 0, whole.output
    (row,) = [line for line in whole.output.splitlines() if GALLERY in line]
    assert [cell.strip() for cell in row.strip("│").split("│")][:3] == [GALLERY, "2", "103"]
    assert world.compact() == [(1, 2)]
    merged = run("verify", GALLERY)
    assert merged.exit_code == 0, merged.output
    (row,) = [line for line in merged.output.splitlines() if GALLERY in line]
    assert [cell.strip() for cell in row.strip("│").split("│")][:3] == [GALLERY, "1", "103"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_wrong_is_found_and_named(world: World, damage: Callable[[World], tuple[str, ...]]) -> None:
    expected = damage(world)
    found = run("verify")
    assert found.exit_code == 1, found.output
    told = [line for line in found.output.splitlines() if ": " in line]
    assert any(all(word in line for word in expected) for line in told), found.output
    assert not re.search(r"(\w+/\S+): \1", found.output), "a file is named once"


def test_with_repair_it_makes_anew_what_it_can_and_names_the_rest(world: World) -> None:
    missing, row = a_missing_index(world)[2], column(world, index=False)
    with world.store.catalog.reading() as session:
        native = session.scalars(select(ColumnRow.file).where(ColumnRow.origin == "native")).first()
    flip(world.store.files.path(native or ""))
    found = run("verify", "--repair")
    assert found.exit_code == 1, found.output
    told = [line for line in found.output.splitlines() if ": " in line]
    assert any(missing in line and "the index was built anew from its column" in line for line in told), found.output
    assert any((native or "") in line and "items again" in line for line in told), found.output
    again = run("verify", GALLERY, "--repair")
    assert again.exit_code == 1, again.output
    assert missing not in again.output
    assert run("verify", "nowhere", "--repair").exit_code == 2
    assert row.file not in again.output


def test_a_derived_column_is_repaired_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDFILL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    with opened(tmp_path) as service:
        service.prepared().filled().upgraded()
        answers = [service.new_search(axis)["hits"] for axis in range(4)]
        with service.store.catalog.reading() as session:
            name = session.scalars(select(ColumnRow.file).where(ColumnRow.origin == "derived")).first()
        flip(service.store.files.path(name or ""))
        repaired = run("verify", "--repair")
        assert repaired.exit_code == 0, repaired.output
        assert "the new vectors were made anew from old by old-to-new" in repaired.output
        assert run("verify").exit_code == 0
        service.app.state.process.galleries.refresh()  # which it does every quarter of a second
        assert [service.new_search(axis)["hits"] for axis in range(4)] == answers


def test_what_cannot_be_verified_is_refused(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no gallery is named 'nowhere'" in run("verify", "nowhere").output
    assert run("verify", "nowhere").exit_code == 2
    monkeypatch.setenv("FORWARDFILL_DATA", str(tmp_path / "nothing"))
    for command in ("verify", "gc"):
        refused = run(command)
        assert refused.exit_code == 2
        assert "there is no folder" in refused.output
    assert not (tmp_path / "nothing").exists(), "who looks changes nothing"
    (tmp_path / "nothing").mkdir()
    refused = run("verify")
    assert refused.exit_code == 2
    assert "forwardfill migrate" in refused.output


def test_a_copy_that_cannot_be_written_is_looked_at_and_nothing_is_removed_from_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(world.store.files.root, copy, ignore=shutil.ignore_patterns("catalog.sqlite3*"))
    with closing(sqlite3.connect(copy / "catalog.sqlite3")) as catalog:
        sqlite3.connect(world.store.files.root / "catalog.sqlite3").backup(catalog)
    orphan = copy / "columns" / "1" / "orphan.npy"
    orphan.write_bytes(b"12345")
    os.utime(orphan, (0, 0))
    there = sorted(copy.rglob("*"))
    monkeypatch.setenv("FORWARDFILL_DATA", str(copy))
    monkeypatch.setenv("FORWARDFILL_DATABASE_URL", f"sqlite:///file:{copy}/catalog.sqlite3?immutable=1&uri=true")
    verified, listed = run("verify"), run("gc")
    assert verified.exit_code == 0, verified.output
    assert listed.exit_code == 0, listed.output
    assert "orphan.npy" in listed.output
    for command in (["gc", "--delete"], ["migrate"]):
        refused = run(*command)
        assert refused.exit_code == 2, refused.output
        assert "cannot be written" in refused.stderr
        assert "catalog.sqlite3?immutable=1&uri=true" in refused.stderr
        assert "try again" not in refused.output
    assert sorted(copy.rglob("*")) == there


@pytest.mark.parametrize("command", ["verify", "gc", "keys list"])
def test_where_sqlite_may_make_no_files_a_refusal_says_how_a_copy_is_looked_at(
    command: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDFILL_DATA", str(world.store.files.root))
    world.store.catalog.close()
    beside = world.store.files.root / "catalog.sqlite3-wal"
    beside.mkdir()  # root may write everywhere, but no file into the place of a folder
    try:
        refused = run(*command.split())
    finally:
        beside.rmdir()
    assert refused.exit_code == 2
    assert "cannot be written" in refused.stderr
    assert "catalog.sqlite3?immutable=1&uri=true" in refused.stderr


@pytest.mark.parametrize("repair", [False, True])
def test_a_gallery_that_is_deleted_before_its_turn_is_left_out_of_the_report(
    world: World, capsys: pytest.CaptureFixture[str], repair: bool
) -> None:
    world.make("zeta")

    @event.listens_for(world.store.catalog.engine, "after_cursor_execute")
    def delete(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "ORDER BY galleries.name" in statement:
            delete_gallery(world.store, "zeta")

    store = world.store
    assert (upkeep.mend(store, None) if repair else upkeep.verify(store.catalog, store.files, None)) == 0
    told = capsys.readouterr().out
    assert GALLERY in told
    assert "zeta" not in told


@pytest.mark.parametrize(
    ("kind", "opened_before"),
    [("ids", 1), ("column", 1), ("column", 2), ("index", 1)],
)
def test_a_gallery_that_is_deleted_while_its_files_are_opened_has_no_problems(
    world: World, kind: str, opened_before: int
) -> None:
    asked = column(world)
    with world.store.catalog.reading() as session:
        ids = session.get_one(SegmentRow, asked.segment_id).ids_file
    name = {"ids": ids, "column": asked.file, "index": asked.index_file}[kind]

    class Leaving(Files):
        left = opened_before

        def path(self, wanted: str) -> Path:
            if wanted == name:
                self.left -= 1
                if self.left == -1:
                    delete_gallery(world.store, GALLERY)
            return super().path(wanted)

    files = Leaving(world.store.files.root)
    assert checks.gallery(world.store.catalog, files, GALLERY).problems == []
    assert files.left < 0


def test_gc_lists_what_nothing_needs_and_removes_it_only_when_it_is_told_to(world: World) -> None:
    root = world.store.files.root
    world.compact()
    known = [path for folder in ("columns", "indexes", "artifacts") for path in (root / folder).rglob("*.*")]
    orphan, torn, young = (root / "columns" / "1" / name for name in ("orphan.npy", "torn.npy.part", "young.npy"))
    for path in (orphan, torn, young):
        path.write_bytes(b"12345")
    long_ago = time.time() - 2 * 3600
    for path in (orphan, torn, *known):
        os.utime(path, (long_ago, long_ago))
    listed = run("gc")
    assert listed.exit_code == 0, listed.output
    assert "2 files, 10 bytes" in listed.output
    assert "orphan.npy" in listed.output
    assert "young.npy" not in listed.output
    assert orphan.exists()
    removed = run("gc", "--delete")
    assert "2 files, 10 bytes: removed" in removed.output
    assert not orphan.exists()
    assert not torn.exists()
    assert young.exists()
    assert all(path.exists() for path in known)
    assert "0 files" in run("gc").output
    assert "young.npy" in run("gc", "--older-than", "0.001").output


def test_every_file_that_a_row_can_name_is_one_that_gc_knows() -> None:
    """A new column of a table that names files must be known to gc before it is used, or gc would remove them."""
    named = {
        f"{table.name}.{c.name}" for table in Base.metadata.sorted_tables for c in table.columns if "file" in c.name
    }
    of_fits = {"fits.ids_file", "fits.vectors_file", "fits.labels_file"}
    assert named == {"segments.ids_file", "segments.side_file", "columns.file", "columns.index_file", *of_fits}
