"""The command line. Commands import what they run when they run it, so that `--help` does not wait for PyTorch."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table
from sqlalchemy.exc import OperationalError
from typer.core import TyperGroup

from forwardfill import native, remote, transformations
from forwardfill.importing.command import command as import_command
from forwardfill.refusals import is_read_only, refusals
from forwardfill.settings import named_folder
from forwardfill.terminal import hand_over, refuse, say, show
from gallery import folder
from gallery.catalog import schema
from gallery.catalog.transaction import Catalog
from gallery.files import Files
from gallery.settings import GallerySettings
from service.ready import make_ready
from service.settings import ServiceSettings
from workers.settings import WorkerSettings


class _Commands(TyperGroup):
    """All commands. An error that an operator can mend ends any of them with one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        with refusals():
            return super().invoke(ctx)


#: Called as `python -m forwardfill`, the shell's completion would take over what completes `python`.
_BY_NAME = Path(sys.argv[0]).name != "__main__.py"

app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=_BY_NAME,
    rich_markup_mode=None,  # a panel cuts the names of options off on a terminal of 80 columns
    pretty_exceptions_show_locals=False,  # there are passwords among them
    help="Upgrade a retrieval gallery in place, while it is searched.",
)
keys = typer.Typer(no_args_is_help=True, help="API keys. Without any, only loopback addresses are served.")
app.add_typer(keys, name="keys")
app.add_typer(remote.models, name="models")
app.add_typer(remote.galleries, name="galleries")
app.add_typer(remote.upgrade, name="upgrade")
app.add_typer(transformations.app, name="transformations")
app.command("import")(import_command)


def _version(asked: bool) -> None:
    if asked:
        say(f"forwardfill {version('forwardfill')}")
        raise typer.Exit


@app.callback()
def _before_any_command(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell the version, and exit.")
    ] = False,
) -> None:
    """Nothing; what stands before the name of a command is an option of the whole."""


Data = Annotated[
    Path | None,
    typer.Option(
        parser=named_folder, metavar="PATH", help="Folder of columns, indexes and artifacts [FORWARDFILL_DATA]."
    ),
]


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [FORWARDFILL_HOST].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [FORWARDFILL_PORT].")] = None,
    data: Data = None,
    worker: Annotated[bool, typer.Option("--worker/--no-worker", help="Start a worker as a child process.")] = True,
    insecure: Annotated[bool, typer.Option(help="Listen beyond loopback although there is no API key.")] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="API processes behind the port [FORWARDFILL_PROCESSES].")
    ] = None,
    group: Annotated[Path | None, typer.Option(hidden=True)] = None,
    place: Annotated[int, typer.Option(hidden=True)] = 0,
    alive: Annotated[int | None, typer.Option(hidden=True)] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the API, and one worker beside it."""
    _environment(HOST=host, PORT=port, DATA=data, INSECURE=insecure or None, PROCESSES=processes)
    from forwardfill.processes import become_child, heed_hangup, worker_child

    heed_hangup()
    if parent is not None:
        become_child(parent)
    settings = ServiceSettings()
    if settings.processes > 1 and group is None:
        _serve_together(settings, worker=worker)
    native.prepare(_settings().threads_used)
    from gallery.index.device import NoSuchDevice
    from service.group import Group, PortTakenError
    from service.main import run

    try:
        run(beside=worker_child if worker else None, group=Group(group, place, alive) if group is not None else None)
    except NoSuchDevice as error:
        refuse(f"FORWARDFILL_INDEX_DEVICE: {error}")
    except PortTakenError as error:
        refuse(str(error))


def _serve_together(settings: ServiceSettings, *, worker: bool) -> NoReturn:
    """Run several API processes. This one only starts them, so it imports neither FAISS nor PyTorch."""
    from forwardfill.processes import serve_together, worker_child
    from service.group import PortTakenError
    from service.telemetry import configure_logs

    configure_logs()
    catalog = _catalog()
    try:
        make_ready(catalog, settings)
        folder.claim(catalog, Files(GallerySettings().data))
        catalog.close()
        status = serve_together(settings, beside=worker_child if worker else nullcontext)
    except PortTakenError as error:
        refuse(str(error))
    raise typer.Exit(status)


@app.command()
def worker(
    data: Data = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
    nice: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Run a worker: it transforms segments and builds indexes. Any number may run."""
    _environment(DATA=data)
    native.prepare(_settings().threads_used)
    from forwardfill.processes import become_child, heed_hangup
    from service.telemetry import configure_logs, pass_on_libraries
    from workers.devices import NoSuchDevice
    from workers.main import run

    configure_logs()
    pass_on_libraries()
    heed_hangup()
    if parent is not None:
        become_child(parent, nice)
    try:
        run()
    except NoSuchDevice as error:
        refuse(f"FORWARDFILL_DEVICE: {error}")


@app.command()
def migrate(data: Data = None) -> None:
    """Bring the catalog's database to this version's schema."""
    _environment(DATA=data)
    catalog = _catalog()
    schema.migrate(catalog)
    say("The catalog has the schema of this version.")


@app.command()
def verify(
    gallery: Annotated[str | None, typer.Argument(help="Only this gallery.")] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Make damaged files anew, where what they are made from is whole; searches may go on."
        ),
    ] = False,
    data: Data = None,
) -> None:
    """Compare all that is stored with the catalog. It reads everything, and exits with 1 if something is wrong."""
    from forwardfill import upkeep

    _environment(DATA=data)
    wrong = _mend(gallery) if repair else upkeep.verify(_current(), GallerySettings().data, gallery)
    raise typer.Exit(1 if wrong else 0)


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove them. Without it, they are only listed.")] = False,
    older_than: Annotated[
        float | None,
        typer.Option(min=0.001, help="Seconds; younger files may be named yet [FORWARDFILL_ORPHAN_SECONDS]."),
    ] = None,
    data: Data = None,
) -> None:
    """List files in the data folder that nothing needs. A crash leaves such behind."""
    from forwardfill import upkeep

    _environment(DATA=data, ORPHAN_SECONDS=older_than)
    catalog = _current()
    if delete:
        folder.check(catalog, Files(GallerySettings().data))
    try:
        upkeep.collect(catalog, GallerySettings().data, WorkerSettings().orphan_seconds, delete=delete)
    except OperationalError as error:
        if is_read_only(error):
            raise
        refuse(f"The catalog is busy or does not answer, so nothing more is removed; try again: {error.orig}")


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="digits (bundled) or cifar100.")] = "digits",
    root: Annotated[Path | None, typer.Option(help="Folder of the data set, for cifar100.")] = None,
    out: Annotated[Path, typer.Option(help="Where report and picture go.")] = Path("build/demo"),
    seed: Annotated[int, typer.Option(help="Seed of all training.")] = 0,
    quick: Annotated[bool, typer.Option(help="Hardly train or measure: see in a minute that all of it runs.")] = False,
) -> None:
    """Upgrade a gallery of images while it is searched. Its models and the transformation are trained first."""
    from forwardfill.demo.run import run

    raise typer.Exit(run(data=data, root=root, out=out, seed=seed, quick=quick))


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="A name to know it by.")],
    scope: Annotated[str, typer.Option(help="search, write (and search) or admin (everything).")] = "search",
    data: Data = None,
) -> None:
    """Make a key and print it. It is stored as a hash, so it cannot be shown again."""
    from service import keys as api_keys

    _environment(DATA=data)
    catalog = _migrated()  # not in the `try`: a wrong setting is a ValueError too, and its text would show the value
    try:
        secret = api_keys.create_key(catalog, name, scope)
    except ValueError as error:
        refuse(str(error))
    try:
        hand_over(secret)
    except OSError as error:
        refuse(
            f"the key {name} is stored, but nobody saw it ({error.strerror}): revoke it with `forwardfill keys revoke {name}`, "
            "and create another under another name",
            code=1,
        )


@keys.command("list")
def list_keys(data: Data = None) -> None:
    """List keys, without the keys themselves."""
    from service import keys as api_keys

    _environment(DATA=data)
    table = Table("name", "scope", "created", "revoked")
    for key in api_keys.list_keys(_migrated()):
        table.add_row(key.name, key.scope, f"{key.created_at:%Y-%m-%d %H:%M}", f"{key.revoked_at or ''}")
    show(table)


@keys.command("revoke")
def revoke_key(name: Annotated[str, typer.Argument(help="The key's name.")], data: Data = None) -> None:
    """Revoke a key: it stops working within a second."""
    from service import keys as api_keys

    _environment(DATA=data)
    api_keys.revoke_key(_migrated(), name)
    say(f"{name} is revoked.")


def _environment(**values: object) -> None:
    """Put options into the environment: they win over what is there, and child processes get them."""
    os.environ.update({f"FORWARDFILL_{name}": str(value) for name, value in values.items() if value is not None})


def _settings() -> GallerySettings:
    """The gallery's settings, after their folder was made."""
    settings = GallerySettings()
    try:
        settings.data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"FORWARDFILL_DATA: the folder {settings.data} cannot be made: {error.strerror}")
    return settings


def _catalog() -> Catalog:
    return Catalog(_settings().database)


def _migrated() -> Catalog:
    catalog = _catalog()
    schema.migrate(catalog)
    return catalog


def _current() -> Catalog:
    """The catalog without migrating it, since a check for damage must not change anything first."""
    settings = GallerySettings()
    if not settings.data.is_dir():
        refuse(f"FORWARDFILL_DATA: there is no folder {settings.data}")
    catalog = Catalog(settings.database)
    if not schema.is_current(catalog):
        refuse(
            "The catalog's database is of an older version, or not there; see FORWARDFILL_DATA and `forwardfill migrate`."
        )
    return catalog


def _mend(gallery: str | None) -> int:
    """Repair one gallery, or all. It may transform items, so it needs PyTorch."""
    catalog = _current()
    native.prepare(GallerySettings().threads_used)
    from forwardfill import upkeep
    from service.app import build_store

    catalog.close()
    store = build_store(GallerySettings())
    folder.check(store.catalog, store.files)
    return upkeep.mend(store, gallery)
