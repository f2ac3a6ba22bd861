"""Bring a database to the schema of this code. One history for SQLite and PostgreSQL, in `migrations/`."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from gallery.catalog.transaction import Catalog

_LOCK = 0x0F0F_F111  # any number, as long as every process uses the same
# While a migration waits for a table that somebody reads, as a backup does for minutes, PostgreSQL has everybody who comes
# later wait behind it. So it waits briefly, steps back for as long, and tries again.
_WAIT_SECONDS = 2.0
_TRIES = 15
_IN_THE_WAY = {"55P03", "40P01"}  # it waited so long for a lock; it and somebody else waited for each other


class NewerSchemaError(Exception):
    """The catalog has a schema that this code does not know."""


class CatalogHeldError(Exception):
    """Another transaction, such as a backup's, holds a table of the catalog, and nothing was changed: migrate when it is over."""


def migrate(catalog: Catalog) -> None:
    """Apply what is missing. Safe to call from several processes at once, and when nothing is missing.

    Raises:
        NewerSchemaError: the database is ahead of this code.
        CatalogHeldError: somebody has held a table for long.
    """
    for left in reversed(range(_TRIES)):
        try:
            with catalog.engine.begin() as connection:
                _alone(connection)
                if not _is_current(connection):
                    command.upgrade(_config(connection), "head")
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) not in _IN_THE_WAY:
                raise
            if not left:
                raise CatalogHeldError(CatalogHeldError.__doc__) from error
            time.sleep(_WAIT_SECONDS)
        else:
            return


def is_current(catalog: Catalog) -> bool:
    """Whether the database has the schema of this code.

    Raises:
        NewerSchemaError: it is ahead of this code.
    """
    with catalog.reading() as session:
        return _is_current(session.connection())


def revise(catalog: Catalog, message: str) -> None:
    """Write a new migration from the difference between the tables and the database."""
    with catalog.engine.begin() as connection:
        command.revision(_config(connection), message, autogenerate=True)


def _is_current(connection: Connection) -> bool:
    history = ScriptDirectory.from_config(_config(connection))
    current, head = MigrationContext.configure(connection).get_current_revision(), history.get_current_head()
    if current is not None and current not in {each.revision for each in history.walk_revisions()}:
        raise NewerSchemaError(
            f"the catalog was made by a newer version (its schema is {current}, the newest that this version knows is {head}): "
            "install that one, or restore a backup"
        )
    return current == head


def _alone(connection: Connection) -> None:
    """One process at a time: on SQLite the write transaction that is open already, on PostgreSQL an advisory lock."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(1000 * _WAIT_SECONDS)}")


def _config(connection: Connection) -> Config:
    spec = find_spec("migrations")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the package `migrations` is not installed beside `gallery`")
    config = Config()
    folder = str(Path(spec.origin).parent)
    config.set_main_option("script_location", folder.replace("%", "%%"))  # Alembic replaces %(names)s in what is set
    config.attributes["connection"] = connection
    return config
