"""Commands that talk to a running service: look at models and galleries, run an upgrade and watch it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy.typing as npt
import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from forwardfill import probes
from forwardfill.answers import Contradicting, Cutover, MissingSide, Order, Throttle, Upgrade
from forwardfill.client import Client
from forwardfill.connection import connected as _client
from forwardfill.dry_run import tell as tell_dry_run
from forwardfill.errors import ForwardfillError
from forwardfill.following import RESTING
from forwardfill.patience import AGAIN_SECONDS, passes, patiently
from forwardfill.tables import listed
from forwardfill.terminal import console, refuse, say
from forwardfill.wire import loaded, real
from gallery.upgrade.gate import LIMITS

models = typer.Typer(no_args_is_help=True, help="Models of a running service.")
galleries = typer.Typer(no_args_is_help=True, help="Galleries of a running service.")
upgrade = typer.Typer(no_args_is_help=True, help="Upgrades of a running service: start, watch, steer.")
_EXPLAINED_SECONDS = 3600.0  # reading and transforming a large gallery

AcceptUnreachable = Annotated[
    bool,
    typer.Option(
        "--accept-unreachable",
        help="Also where queries of the source model will not find what came in the target model meanwhile.",
    ),
]


@models.command("list")
def list_models() -> None:
    """List the registered models."""
    with _client() as client:
        shown = [
            {**each, "side_dimension": (each["side_information"] or {}).get("dimension")} for each in client.models()
        ]
    listed(shown, "name", "dimension", "metric", "normalized", "side_dimension")


@galleries.command("list")
def list_galleries() -> None:
    """List the galleries."""
    with _client() as client:
        listed(client.galleries(), "name", "model", "items", "segments", "version", "active_upgrade")


@galleries.command("show")
def show_gallery(name: str) -> None:
    """Show one gallery: its items, columns and bytes."""
    with _client() as client:
        console.print_json(data=client.gallery(name))


@galleries.command("compact")
def compact_gallery(name: str) -> None:
    """Merge small segments and leave out deleted rows. A worker does it, also by itself."""
    with _client() as client:
        found = client.compact_gallery(name)
    say(f"{name}: a worker will merge what is small among {found['segments']} segments")


@galleries.command("explain")
def explain_search(
    name: str,
    model: Annotated[str, typer.Option(help="The model that embedded the query.")],
    vector: Annotated[Path, typer.Option(help="The query: an .npy file with one vector.")],
    companion: Annotated[
        list[str] | None, typer.Option(help="The same query of another model, as MODEL=FILE; may be repeated.")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Hits; 10, or as many as the service allows, unless given.")] = None,
    oversample: Annotated[int | None, typer.Option(help="Candidates per hit that are transformed.")] = None,
) -> None:
    """Do a search and show how. Told are the plan, the time of each step, and what exact search of the gallery finds."""
    companions = {model: _vector(Path(file)) for model, file in _pairs(companion, "--companion", "MODEL=FILE").items()}
    with _client(timeout=_EXPLAINED_SECONDS) as client:
        found = client.explain(name, model, _vector(vector), k=k, companions=companions, oversample=oversample)
    shelves = [{**shelf, "index": shelf["index"] and shelf["index"]["kind"]} for shelf in found["plan"]["shelves"]]
    listed(shelves, "segments", "route", "column", "index", "live", "candidates", "ask_ms")
    listed([found["milliseconds"]], *found["milliseconds"])
    shown = {"all": found["exact"]["recall"], **found["exact"]["by_route"]}
    listed([{"route": route, **recall} for route, recall in shown.items()], "route", "hits", "found", "recall")


@galleries.command("set-probes")
def set_probes(
    name: str,
    vectors: Annotated[
        list[str],
        typer.Option(help="Queries of a model, as MODEL=FILE: .npy, (n, dimension); repeat it for each model."),
    ],
    relevant: Annotated[
        Path | None, typer.Option(help="JSON lines: for each query, a list of the ids that ought to be found.")
    ] = None,
) -> None:
    """Replace the probes of a gallery. Upgrades are measured by them, and stopped by their gates."""
    files = {model: Path(file) for model, file in _pairs(vectors, "--vectors", "MODEL=FILE").items()}
    try:
        queries = probes.vectors(files)
        count = len(next(iter(queries.values())))
        ids = None if relevant is None else probes.relevant(relevant, count)
    except ValueError as error:
        refuse(str(error))
    with _client() as client:
        found = client.set_probes(name, queries, relevant=ids)
    say(f"{name}: {found['probes']} probes")


@upgrade.command("start")
def start(
    gallery: str,
    *,
    transformation: Annotated[str | None, typer.Option(help="By the transformation's name.")] = None,
    target: Annotated[str | None, typer.Option(help="By the latest transformation to this model.")] = None,
    cutover: Annotated[
        Cutover, typer.Option(help="Serve each segment as it is done, or all at the end: by itself, or on request.")
    ] = "progressive",
    order: Annotated[
        Order, typer.Option(help="Of the segments: as stored, least certain first, or most searched first.")
    ] = "stored",
    gate: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help=f"Stop where quality misses a limit: {', '.join(LIMITS)}."),
    ] = None,
    on_missing_side_information: Annotated[
        MissingSide, typer.Option(help="Refuse to start, map with zeros in its place, or leave such items out.")
    ] = "fail",
    on_contradicting_items: Annotated[
        Contradicting,
        typer.Option(
            help="Refuse to start where items that came again in the target model are not where they are mapped."
        ),
    ] = "fail",
    score_threshold: Annotated[
        list[float] | None,
        typer.Option(help="A cut-off on scores, of which the report tells what becomes; may be repeated."),
    ] = None,
    items_per_second: Annotated[float | None, typer.Option(help="Go no faster.")] = None,
    duty_cycle: Annotated[float | None, typer.Option(help="Work this part of the time, 0 to 1.")] = None,
    max_search_p99_ms: Annotated[float | None, typer.Option(help="Wait while searches are slower.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Validate and report, change nothing.")] = False,
    watch_it: Annotated[bool, typer.Option("--watch/--no-watch", help="Stay and show the progress.")] = True,
) -> None:
    """Start an upgrade, and watch it. With --dry-run, tell what would come of it."""
    limits = _gate(gate)
    if (transformation is None) == (target is None):
        raise typer.BadParameter("name either --transformation or --target")
    with _client() as client:
        started = client.start_upgrade(
            gallery,
            transformation=transformation,
            target_model=target,
            cutover=cutover,
            order=order,
            throttle=_throttle(items_per_second, duty_cycle, max_search_p99_ms) or None,
            gate=limits or None,
            on_missing_side_information=on_missing_side_information,
            on_contradicting_items=on_contradicting_items,
            score_thresholds=score_threshold or (),
            dry_run=dry_run,
        )
        say(f"upgrade {started['id']}")
        if watch_it:
            (_await_dry_run if dry_run else _watch)(client, started["id"])


@upgrade.command("list")
def list_upgrades() -> None:
    """List the upgrades."""
    with _client() as client:
        listed(client.upgrades(), "id", "gallery", "source_model", "target_model", "state", "dry_run", "created_at")


@upgrade.command("show")
def show(upgrade_id: str) -> None:
    """Show one upgrade."""
    with _client() as client:
        console.print_json(data=client.upgrade(upgrade_id))


@upgrade.command("watch")
def watch(upgrade_id: str) -> None:
    """Follow an upgrade until it ends, or waits for a person."""
    with _client() as client:
        _watch(client, upgrade_id)


@upgrade.command("failures")
def failures(upgrade_id: str) -> None:
    """List the segments that failed."""
    with _client() as client:
        listed(client.failures(upgrade_id), "segment", "items", "attempts", "error")


@upgrade.command("throttle")
def throttle(
    upgrade_id: str,
    items_per_second: Annotated[float | None, typer.Option(help="Go no faster; 0 removes the limit.")] = None,
    duty_cycle: Annotated[float | None, typer.Option(help="Work this part of the time; 0 removes the limit.")] = None,
    max_search_p99_ms: Annotated[float | None, typer.Option(help="Wait while slower; 0 removes the limit.")] = None,
) -> None:
    """Change how fast an upgrade may go, while it runs."""
    given = _throttle(items_per_second, duty_cycle, max_search_p99_ms)
    if not given:
        raise typer.BadParameter("name a limit: --items-per-second, --duty-cycle or --max-search-p99-ms")
    wanted: Any = {name: value or None for name, value in given.items()}
    with _client() as client:
        _tell(client.set_throttle(upgrade_id, wanted))


def _verb(name: str, does: str, call: Callable[[Client, str], Upgrade]) -> None:
    """Add a command that does one thing with an upgrade and prints the result."""

    @upgrade.command(name, help=does)
    def command(upgrade_id: str) -> None:
        with _client() as client:
            _tell(call(client, upgrade_id))


_verb("pause", "Start no more segments.", Client.pause)
_verb("resume", "Go on where it stopped. In spite of its gate, if that stopped it after it had begun.", Client.resume)
_verb("retry", "Try again what failed. Segments, or the check or the gate that ended the upgrade.", Client.retry)
_verb("finalize", "Let go of the older model's columns: no way back.", Client.finalize)


@upgrade.command("cutover")
def cut_over(
    upgrade_id: str,
    accept_below_gate: Annotated[
        bool, typer.Option("--accept-below-gate", help="Also where the quality that was measured misses the gate.")
    ] = False,
) -> None:
    """Let all transformed segments serve."""
    with _client() as client:
        _tell(client.cutover(upgrade_id, accept_below_gate=accept_below_gate))


@upgrade.command("cancel")
def cancel(upgrade_id: str, accept_unreachable: AcceptUnreachable = False) -> None:
    """Go back to the state before the upgrade."""
    with _client() as client:
        _tell(client.cancel(upgrade_id, accept_unreachable=accept_unreachable))


@upgrade.command("rollback")
def rollback(upgrade_id: str, accept_unreachable: AcceptUnreachable = False) -> None:
    """Undo a completed upgrade, byte for byte."""
    with _client() as client:
        _tell(client.rollback(upgrade_id, accept_unreachable=accept_unreachable))


def _await_dry_run(client: Client, upgrade_id: str) -> None:
    with console.status("a worker checks it"):
        found = client.wait(upgrade_id, until=RESTING | {"completed"})
    tell_dry_run(found)
    if found["state"] != "completed":
        raise typer.Exit(1)


def _watch(client: Client, upgrade_id: str) -> None:
    bar = Progress(
        TextColumn("{task.fields[state]}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console
    )
    now = client.upgrade(upgrade_id)
    with bar:
        task = bar.add_task(upgrade_id, total=1.0, state="")
        seen: str | None = None  # without an id, a stream begins with the present state, which ends the loop below
        while True:
            bar.update(task, completed=now["progress"]["fraction"], state=now["state"])
            if now["state"] in RESTING | {"completed", "paused", "awaiting_cutover"}:
                break
            try:
                for event in client.events(upgrade_id, after=seen):
                    seen = event.id or seen
                    bar.update(task, completed=event.data.get("fraction", bar.tasks[0].completed))
                    if event.name == "state":
                        break
            except (httpx.TransportError, ForwardfillError) as error:
                if not passes(error):
                    raise
                time.sleep(AGAIN_SECONDS)
            now = patiently(lambda: client.upgrade(upgrade_id))
    _tell(now)
    if now["state"] == "failed":
        raise typer.Exit(1)


def _tell(found: Upgrade) -> None:
    why = "".join(f"; {condition['type']}: {condition['detail']}" for condition in found["conditions"])
    say(f"{found['gallery']}: {found['state']}, {found['progress']['fraction']:.0%}{why}")
    if found["error"]:
        say(found["error"], style="red")


def _throttle(items_per_second: float | None, duty_cycle: float | None, max_search_p99_ms: float | None) -> Throttle:
    given: Any = {
        "items_per_second": items_per_second,
        "duty_cycle": duty_cycle,
        "max_search_p99_ms": max_search_p99_ms,
    }
    wanted: Any = {name: value for name, value in given.items() if value is not None}
    for name, value in wanted.items():
        if not math.isfinite(value):
            raise typer.BadParameter(f"--{name.replace('_', '-')} {value}: a finite number")
    return wanted  # type: ignore[no-any-return]


def _gate(given: Sequence[str] | None) -> dict[str, float]:
    """Limits by name; whole numbers stay whole, since some limits count."""
    found = dict[str, float]()
    for name, text in _pairs(given, "--gate", "NAME=NUMBER").items():
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if name not in LIMITS or not math.isfinite(number):
            raise typer.BadParameter(f"--gate {name}={text}: NAME=NUMBER, where NAME is one of {', '.join(LIMITS)}")
        found[name] = int(number) if number.is_integer() else number
    return found


def _pairs(given: Sequence[str] | None, option: str, form: str) -> dict[str, str]:
    """The values of a repeatable option by name."""
    found = dict(each.split("=", 1) for each in given or () if "=" in each)
    if len(found) < len(given or ()):
        raise typer.BadParameter(f"{option} is {form}, each {form.partition('=')[0]} once")
    return found


def _vector(file: Path) -> npt.NDArray[Any]:
    """The one vector of a file, (dimension,) or (1, dimension)."""
    try:
        found = real(loaded(file), str(file))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if found.ndim > 1 and len(found) != 1:
        raise typer.BadParameter(f"{file} has {len(found)} vectors, and a query is one: store a row of it")
    return found.reshape(-1)
