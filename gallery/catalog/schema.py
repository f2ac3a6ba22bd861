"""Bring a database to the schema of this code. One history for SQLite and PostgreSQL, in `migrations/`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from gallery.catalog.transaction import Catalog

_LOCK = 0x0F0F_F111  # any number, as long as every process uses the same


def migrate(catalog: Catalog) -> None:
    """Apply what is missing. Safe to call from several processes at once, and when nothing is missing."""
    with catalog.engine.begin() as connection:
        _alone(connection)
        command.upgrade(_config(connection), "head")


def is_current(catalog: Catalog) -> bool:
    """Whether the database has the schema of this code."""
    with catalog.reading() as session:
        connection = session.connection()
        config = _config(connection)
        head = ScriptDirectory.from_config(config).get_current_head()
        return MigrationContext.configure(connection).get_current_revision() == head


def revise(catalog: Catalog, message: str) -> None:
    """Write a new migration from the difference between the tables and the database."""
    with catalog.engine.begin() as connection:
        command.revision(_config(connection), message, autogenerate=True)


def _alone(connection: Connection) -> None:
    """One process at a time: on SQLite the write transaction that is open already, on PostgreSQL an advisory lock."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})


def _config(connection: Connection) -> Config:
    spec = find_spec("migrations")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the package `migrations` is not installed beside `gallery`")
    config = Config()
    config.set_main_option("script_location", str(Path(spec.origin).parent))
    config.attributes["connection"] = connection
    return config
