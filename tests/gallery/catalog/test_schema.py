"""One history of migrations, on both databases."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, select, text
from sqlalchemy.exc import DBAPIError

import migrations
from gallery.catalog import schema
from gallery.catalog.schema import is_current, migrate
from gallery.catalog.tables import Base, ColumnRow
from gallery.catalog.transaction import Catalog
from tests.acceptance.system import wait_for


@pytest.fixture
def catalog(catalog_url: str) -> Iterator[Catalog]:
    """An empty database, once of each kind."""
    opened = Catalog(catalog_url)
    yield opened
    opened.close()


def test_an_empty_database_comes_to_the_tables_of_this_code(catalog: Catalog) -> None:
    assert not is_current(catalog)
    migrate(catalog)
    assert is_current(catalog)
    with catalog.engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
        tables = set(inspect(connection).get_table_names())
    assert differences == []
    assert tables == {*Base.metadata.tables, "alembic_version"}


def test_migrating_twice_is_migrating_once(catalog: Catalog) -> None:
    migrate(catalog)
    with catalog.transaction() as tx:
        tx.session.execute(text("INSERT INTO events (at, action, detail) VALUES ('2026-01-01', 'kept', '{}')"))
    migrate(catalog)
    with catalog.reading() as session:
        assert session.scalars(text("SELECT action FROM events")).all() == ["kept"]


def test_processes_that_migrate_at_once_wait_for_each_other(catalog: Catalog, catalog_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Barrier(3)
    processes = [context.Process(target=_migrate_at_once, args=(catalog_url, started)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert is_current(catalog)


#: who waits for a table of this database
WAITING = """
SELECT pid FROM pg_locks JOIN pg_database ON pg_database.oid = database
WHERE NOT granted AND relation IS NOT NULL AND datname = current_database()
"""


@pytest.fixture
def held(postgres_url: str) -> Iterator[tuple[Catalog, Connection]]:
    """A catalog of the former schema on PostgreSQL, and who reads a table of it for long, as pg_dump does."""
    catalog = Catalog(postgres_url)
    _step(catalog, command.upgrade, "20261129")
    with catalog.engine.connect() as reader:
        reader.execute(text("SELECT id FROM upgrades"))
        yield catalog, reader
    catalog.close()


def test_a_migration_that_waits_for_a_backup_has_nobody_else_wait_for_long(
    held: tuple[Catalog, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not until the backup is over, which here is after they were answered."""
    catalog, reader = held
    monkeypatch.setattr(schema, "_WAIT_SECONDS", 0.3)
    monkeypatch.setattr(schema, "_TRIES", 1000)
    with ThreadPoolExecutor(1) as pool:
        migrating = pool.submit(migrate, catalog)
        for _ in range(3):
            wait_for(lambda: _all(catalog, WAITING), 60, lambda: "the migration waits for no table")
            with catalog.reading() as session:
                session.execute(text("SET LOCAL lock_timeout = '60s'"))
                session.execute(text("SELECT id FROM upgrades"))
        assert not migrating.done()
        reader.rollback()
        migrating.result(60)
    assert is_current(catalog)


def test_a_migration_that_is_kept_from_a_table_for_long_says_so_and_changes_nothing(
    held: tuple[Catalog, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, _ = held
    monkeypatch.setattr(schema, "_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(schema, "_TRIES", 2)
    with pytest.raises(schema.CatalogHeldError, match="such as a backup's"):
        migrate(catalog)
    assert _all(catalog, "SELECT version_num FROM alembic_version") == [("20261129",)]


def test_looking_at_the_schema_waits_for_no_writer(catalog: Catalog) -> None:
    migrate(catalog)
    with catalog.transaction():
        assert is_current(catalog)


@pytest.mark.parametrize("name", ["50%off", "%(here)s", "a:b c"])
def test_the_history_is_read_wherever_it_is_installed(
    catalog: Catalog, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name / "migrations"
    shutil.copytree(Path(migrations.__file__).parent, folder)
    there = spec_from_file_location("migrations", folder / "__init__.py")
    monkeypatch.setattr(schema, "find_spec", lambda _: there)
    migrate(catalog)
    assert is_current(catalog)


def test_a_catalog_of_a_newer_version_is_neither_migrated_nor_compared(catalog: Catalog) -> None:
    migrate(catalog)
    with catalog.transaction() as tx:
        tx.session.execute(text("UPDATE alembic_version SET version_num = '20991231'"))
    for look in (migrate, is_current):
        with pytest.raises(schema.NewerSchemaError, match=r"20991231.* install that one, or restore a backup"):
            look(catalog)


def test_the_database_itself_keeps_ids_live_once_and_upgrades_alone(catalog: Catalog) -> None:
    migrate(catalog)
    with catalog.engine.connect() as connection:
        inspected = inspect(connection)
        unique = {
            index["name"]: index["unique"] for table in ("items", "upgrades") for index in inspected.get_indexes(table)
        }
    assert unique["items_live"]
    assert unique["upgrades_active"]


def test_segments_and_what_refers_to_them_survive_the_column_of_their_hits_in_both_directions(catalog: Catalog) -> None:
    _step(catalog, command.upgrade, "20261120")
    with catalog.transaction() as tx:
        for statement in A_SEGMENT:
            tx.session.execute(text(statement))
    migrate(catalog)
    assert _all(catalog, "SELECT id, rows, hits FROM segments") == [(7, 3, 0)]
    _step(catalog, command.downgrade, "20261120")
    assert _all(catalog, "SELECT id, rows FROM segments") == [(7, 3)]
    assert _all(catalog, "SELECT segment_id FROM columns") == [(7,)]
    with pytest.raises(DBAPIError):
        _all(catalog, "SELECT hits FROM segments")
    migrate(catalog)
    assert is_current(catalog)


def test_columns_that_were_derived_before_lineages_were_kept_name_their_last_transformation(catalog: Catalog) -> None:
    _step(catalog, command.upgrade, "20261122")
    with catalog.transaction() as tx:
        for statement in (*A_SEGMENT, *DERIVED):
            tx.session.execute(text(statement))
    migrate(catalog)
    with catalog.reading() as session:
        lineages = dict(session.execute(select(ColumnRow.origin, ColumnRow.lineage)).all())
    assert lineages == {
        "native": [],
        "derived": [{"transformation": "forward", "artifact": "digest", "source": "old"}],
    }


def test_what_was_transformed_before_it_was_counted_is_counted(catalog: Catalog) -> None:
    _step(catalog, command.upgrade, "20261125")
    with catalog.transaction() as tx:
        for statement in (*A_SEGMENT, *DERIVED, *TWO_UPGRADES):
            tx.session.execute(text(statement))
    migrate(catalog)
    assert _all(catalog, "SELECT id, items_transformed FROM upgrades ORDER BY id") == [("first", 3), ("second", 0)]
    _step(catalog, command.downgrade, "20261125")
    assert _all(catalog, "SELECT id FROM upgrades ORDER BY id") == [("first",), ("second",)]


def test_what_was_deleted_before_it_was_counted_is_counted(catalog: Catalog) -> None:
    _step(catalog, command.upgrade, "20261203")
    with catalog.transaction() as tx:
        for statement in (*A_SEGMENT, ONE_DELETED_OF_TWO):
            tx.session.execute(text(statement))
    migrate(catalog)
    assert _all(catalog, "SELECT id, rows, dead FROM segments") == [(7, 3, 1)]
    _step(catalog, command.downgrade, "20261203")
    assert _all(catalog, "SELECT id, rows FROM segments") == [(7, 3)]


def test_the_history_can_be_taken_back_to_nothing(catalog: Catalog) -> None:
    migrate(catalog)
    _step(catalog, command.downgrade, "base")
    with catalog.engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]


@pytest.mark.parametrize("table", ["galleries", "segments", "columns", "models", "transformations", "events"])
def test_ids_are_never_given_out_again(catalog: Catalog, table: str) -> None:
    migrate(catalog)
    if catalog.engine.dialect.name == "sqlite":
        with catalog.reading() as session:
            statement = session.scalar(text("SELECT sql FROM sqlite_master WHERE name = :table"), {"table": table})
        assert "AUTOINCREMENT" in statement


A_SEGMENT = (
    "INSERT INTO models (id, name, dimension, metric, normalized, created_at)"
    " VALUES (1, 'old', 4, 'cosine', true, '2026-01-01')",
    'INSERT INTO galleries (id, name, model_id, "index", storage_dtype, version, created_at)'
    " VALUES (1, 'photos', 1, '{}', 'float32', 1, '2026-01-01')",
    "INSERT INTO segments (id, gallery_id, rows, version, ids_file, ids_sha256, ids_bytes, created_at)"
    " VALUES (7, 1, 3, 1, 'ids', 'digest', 1, '2026-01-01')",
    "INSERT INTO columns (segment_id, model_id, origin, published, dtype, file, sha256, bytes, index_kind,"
    " index_parameters, created_at)"
    " VALUES (7, 1, 'native', true, 'float32', 'file', 'digest', 1, 'flat', '{}', '2026-01-01')",
)

ONE_DELETED_OF_TWO = (
    "INSERT INTO items (segment_id, row, gallery_id, item_id, deleted_version)"
    " VALUES (7, 0, 1, 'a', 1), (7, 1, 1, 'b', NULL)"
)

DERIVED = (
    "INSERT INTO models (id, name, dimension, metric, normalized, created_at)"
    " VALUES (2, 'new', 4, 'cosine', true, '2026-01-01')",
    "INSERT INTO artifacts (sha256, bytes, architecture, created_at) VALUES ('digest', 1, '{}', '2026-01-01')",
    "INSERT INTO transformations (id, name, source_id, target_id, direction, method, artifact, created_at)"
    " VALUES (3, 'forward', 1, 2, 'forward', 'affine', 'digest', '2026-01-01')",
    "INSERT INTO columns (segment_id, model_id, origin, transformation_id, published, dtype, file, sha256, bytes,"
    " index_kind, index_parameters, created_at)"
    " VALUES (7, 2, 'derived', 3, true, 'float32', 'other', 'digest', 1, 'flat', '{}', '2026-01-01')",
)

_AN_UPGRADE = (
    "INSERT INTO upgrades (id, gallery_name, source_id, target_id, transformation_id, artifact, others, state, state_since,"
    ' active, cutover, "order", missing_side, dry_run, throttle, gate, quality, report, created_at)'
    " VALUES ('{id}', 'photos', 1, 2, 3, 'digest', '[]', 'completed', '2026-01-01', false, 'progressive', 'position', 'fail',"
    " false, '{{}}', '{{}}', '{{}}', '{{}}', '2026-01-01')"
)
_ITS_WORK = (
    "INSERT INTO upgrade_segments (upgrade_id, segment_id, position, rows, state, fence, attempts)"
    " VALUES ('{id}', 7, 0, 3, '{state}', 1, 1)"
)
TWO_UPGRADES = (
    _AN_UPGRADE.format(id="first"),
    _AN_UPGRADE.format(id="second"),
    _ITS_WORK.format(id="first", state="done"),
    _ITS_WORK.format(id="second", state="pending"),
)


def _step(catalog: Catalog, step: Callable[[Config, str], None], revision: str) -> None:
    with catalog.engine.begin() as connection:
        step(schema._config(connection), revision)


def _all(catalog: Catalog, statement: str) -> list[tuple[object, ...]]:
    with catalog.reading() as session:
        return [tuple(row) for row in session.execute(text(statement))]


def _migrate_at_once(url: str, started: object) -> None:
    catalog = Catalog(url)
    started.wait()  # type: ignore[attr-defined]
    migrate(catalog)
    assert is_current(catalog)
    catalog.close()
