"""The database, and the only place that commits.

Two kinds of transaction. `reading` sees one consistent state and changes nothing. `transaction` writes: on SQLite it takes
the write lock at its start (BEGIN IMMEDIATE), so that two writers queue instead of one failing half-way; on PostgreSQL
writers of one gallery queue on the gallery's row, which every publishing transaction updates first (`galleries.bump`).

What must follow a commit (messages, refreshes, removal of files) is put into `Transaction.after`: the row is the truth, and
a message about a row that was rolled back would be a lie.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog
from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from gallery import errors, faults

log = structlog.get_logger()
#: The database did not answer. That says nothing of what was asked, so whoever meets one of these may do the same again.
UNANSWERED = (OperationalError, InterfaceError, PoolTimeout)
_BUSY_TIMEOUT_MS = 30_000  # an Arrow upsert of a million rows may hold SQLite's write lock for many seconds
# No transaction that writes waits for its own process for so long. One that reads may: it opens files meanwhile.
_SUSPENDED_MS = 30_000

# libpq's, unless the URL says otherwise: without them a server's host that is gone is waited for from two minutes to two hours.
_PATIENCE = {"connect_timeout": 10, "keepalives_idle": 30, "tcp_user_timeout": 30_000}


class Transaction:
    """A session that will be committed, and what to do once it is."""

    def __init__(self, session: Session) -> None:
        """Wrap the session."""
        self.session = session
        self.after: list[Callable[[], None]] = []


class Catalog:
    """A database and its two kinds of transaction; safe to share between threads."""

    def __init__(self, url: str | URL) -> None:
        """Connect lazily to a SQLAlchemy URL (`sqlite:///...` or `postgresql+psycopg://...`)."""
        self.engine = _engine(url)
        self._write = sessionmaker(self.engine, expire_on_commit=False)
        self._read = sessionmaker(_for_reading(self.engine), expire_on_commit=False, autoflush=False)

    @contextmanager
    def transaction(self, name: str = "") -> Iterator[Transaction]:
        """Write: all of it is durable when the block ends well, none of it when it raises.

        Args:
            name: what `faults` knows it by, if it has points there.
        """
        with self._write.begin() as session:
            tx = Transaction(session)
            yield tx
            faults.reached(name)
        faults.reached(f"{name}.committed")
        for action in tx.after:
            _attempt(action)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Read one consistent state."""
        with self._read() as session:
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def in_words(error: Exception) -> str:
    """What went wrong, for people who see no logs: without the statement and its values, which may be anybody's data. What we
    refuse is said in a sentence already; of all else the class says more than some messages do."""
    said = str(error)
    if isinstance(error, errors.GalleryError):
        return said
    if isinstance(error, StatementError) and error.orig is not None:
        said = str(error.orig).partition("\n")[0]
    return f"{type(error).__name__}: {said}"


def _attempt(action: Callable[[], None]) -> None:
    """Do what follows a commit. A failure loses nothing: files that stay are swept later, and workers look for work unasked."""
    try:
        action()
    except Exception:
        log.exception("after_commit_failed")


def _engine(url: str | URL) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        patience = {name: value for name, value in _PATIENCE.items() if name not in parsed.query}
        engine = create_engine(
            url, json_serializer=_as_json, pool_pre_ping=True, pool_size=10, max_overflow=20, connect_args=patience
        )
        event.listen(engine, "begin", _begin_postgresql)
        event.listen(engine, "handle_error", _as_unanswered)
        return engine
    engine = create_engine(url, json_serializer=_as_json, connect_args={"timeout": _BUSY_TIMEOUT_MS / 1000})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _as_json(value: Any) -> str:
    """JSON, with null for NaN and infinity, which a measure that overflowed is: PostgreSQL and clients refuse them."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_with_nulls(value), allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_nulls(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _for_reading(engine: Engine) -> Engine:
    if engine.dialect.name == "sqlite":
        return engine.execution_options(forwardfill_reading=True)
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def _begin_postgresql(connection: Connection) -> None:
    """Let the server end a transaction whose process is suspended: it would hold its locks against all others."""
    if not connection.get_execution_options().get("postgresql_readonly"):
        connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {_SUSPENDED_MS}")


def _as_unanswered(context: ExceptionContext) -> OperationalError | None:
    """A server that ends a connection has not answered. It calls that an internal error where it waited long for its client."""
    if not (context.is_disconnect and isinstance(context.sqlalchemy_exception, InternalError)):
        return None
    return OperationalError(
        context.statement, context.parameters, context.original_exception, connection_invalidated=True
    )


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # Python's driver must not begin transactions on its own: `_begin_sqlite` does
    for pragma in (f"busy_timeout={_BUSY_TIMEOUT_MS}", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
    _use_wal(connection)


def _use_wal(connection: Any) -> None:
    """Only the first connection to a new database changes anything; for a rival in that moment SQLite does not wait by itself."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    if connection.get_execution_options().get("forwardfill_reading"):
        connection.exec_driver_sql("BEGIN")
        return
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    # Where SQLite may not write, that takes no lock and says nothing; files would be removed while others name them. This writes
    # nothing either, since no catalog is of the kind that it is for, but is refused there.
    connection.exec_driver_sql("PRAGMA incremental_vacuum(1)")
