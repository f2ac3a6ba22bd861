"""The command line. Commands import what they run when they run it: `--help` waits neither for PyTorch nor for SQLAlchemy."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.table import Table
from typer.core import TyperGroup

from forwardfill import native, remote, transformations
from forwardfill.importing.command import command as import_command
from forwardfill.settings import named_folder
from forwardfill.terminal import hand_over, refuse, say, show

if TYPE_CHECKING:
    from service.settings import ServiceSettings


class _Commands(TyperGroup):
    """All commands. An error that an operator can mend ends any of them with one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for. Status 2 and a line are the end of an error that `in_words` knows."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.BadParameter):  # the command's own words, which need no import
            raise
        except Exception as error:
            from forwardfill.refusals import in_words

            words = in_words(error)
            if words is None:
                raise
            refuse(words)


#: Called as `python -m forwardfill`, the shell's completion would take over what completes `python`.
_BY_NAME = Path(sys.argv[0]).parts[-2:] != ("forwardfill", "__main__.py")

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
        from importlib.metadata import version

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
    from forwardfill import data_folder
    from service.settings import ServiceSettings

    settings = ServiceSettings()
    if settings.processes > 1 and group is None:
        _serve_together(settings, worker=worker)
    native.prepare(data_folder.settings().threads_used)
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
    from forwardfill.data_folder import make_service_ready
    from forwardfill.processes import serve_together, worker_child
    from service.group import PortTakenError
    from service.telemetry import configure_logs

    configure_logs()
    try:
        make_service_ready(settings)
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
    from forwardfill import data_folder

    _environment(DATA=data)
    native.prepare(data_folder.settings().threads_used)
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
    from forwardfill.data_folder import migrated_catalog

    _environment(DATA=data)
    migrated_catalog()
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
    from forwardfill import data_folder

    _environment(DATA=data)
    store = data_folder.store() if repair else None
    from forwardfill import upkeep  # not before `store`: it imports FAISS, which must be prepared for

    wrong = upkeep.verify(*data_folder.catalog_and_files(), gallery) if store is None else upkeep.mend(store, gallery)
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
    from forwardfill import data_folder, upkeep
    from workers.settings import WorkerSettings

    _environment(DATA=data, ORPHAN_SECONDS=older_than)
    upkeep.collect(*data_folder.catalog_and_files(), WorkerSettings().orphan_seconds, delete=delete)


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
    from forwardfill.data_folder import migrated_catalog
    from service import keys as api_keys

    _environment(DATA=data)
    # Not in the `try`: a wrong setting is a ValueError too, and its text would show the value.
    catalog = migrated_catalog()
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
    from forwardfill.data_folder import catalog
    from service import keys as api_keys

    _environment(DATA=data)
    table = Table("name", "scope", "created", "revoked")
    for key in api_keys.list_keys(catalog()):
        times = (f"{at:%Y-%m-%d %H:%M}" if at else "" for at in (key.created_at, key.revoked_at))
        table.add_row(key.name, key.scope, *times)
    show(table)


@keys.command("revoke")
def revoke_key(name: Annotated[str, typer.Argument(help="The key's name.")], data: Data = None) -> None:
    """Revoke a key: it stops working within a second."""
    from forwardfill.data_folder import catalog
    from service import keys as api_keys

    _environment(DATA=data)
    api_keys.revoke_key(catalog(), name)
    say(f"{name} is revoked.")


def _environment(**values: object) -> None:
    """Put options into the environment: they win over what is there, and child processes get them."""
    os.environ.update({f"FORWARDFILL_{name}": str(value) for name, value in values.items() if value is not None})
