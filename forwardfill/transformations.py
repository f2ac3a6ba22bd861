"""Commands about the transformations of a running service: list them, and fit one from a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from forwardfill.client import Client
from forwardfill.connection import connected
from forwardfill.tables import listed
from forwardfill.terminal import console, refuse, say

app = typer.Typer(no_args_is_help=True, help="Transformations of a running service: list, fit.")


@app.command("list")
def list_transformations() -> None:
    """List the registered transformations."""
    with connected() as client:
        listed(client.transformations(), "name", "source", "target", "direction", "method")


@app.command("fit")
def fit(
    gallery: str,
    *,
    name: Annotated[str, typer.Option(help="Of the transformation.")],
    target: Annotated[str, typer.Option(help="The model that made the new embeddings.")],
    ids: Annotated[Path, typer.Option(help="Text, an id of the gallery a line.")],
    embeddings: Annotated[Path, typer.Option(help="The new embeddings of these items, .npy of shape (n, d).")],
    labels: Annotated[Path | None, typer.Option(help="Text, a label a line: what has one label is relevant.")] = None,
    method: Annotated[str, typer.Option(help="A method, or auto: whichever is best.")] = "auto",
    direction: Annotated[
        Literal["forward", "backward"], typer.Option(help="For the gallery, or for queries.")
    ] = "forward",
    seed: Annotated[int, typer.Option(help="Of the split and of the training.")] = 0,
    watch_it: Annotated[bool, typer.Option("--watch/--no-watch", help="Stay and show the progress.")] = True,
) -> None:
    """Fit a transformation, and tell whether to upgrade with it. The service's worker does it."""
    from forwardfill import pairs

    try:
        stream = pairs.from_files(ids, embeddings, labels)
    except ValueError as error:
        refuse(str(error))
    with connected() as client:
        started = client.start_fit(
            gallery, stream, name=name, target=target, method=method, direction=direction, seed=seed
        )
        say(f"fit {started['id']}")
        if watch_it:
            _watch(client, started["id"])


@app.command("fits")
def list_fits() -> None:
    """List the fits."""
    with connected() as client:
        listed(client.fits(), "id", "gallery", "name", "target_model", "state", "fitted_method", "created_at")


@app.command("show-fit")
def show_fit(fit_id: str) -> None:
    """Show one fit: its progress, and its verdict with all numbers."""
    with connected() as client:
        console.print_json(data=client.fit(fit_id))


@app.command("cancel-fit")
def cancel_fit(fit_id: str) -> None:
    """End a fit that has not ended."""
    with connected() as client:
        say(f"fit {fit_id} is {client.cancel_fit(fit_id)['state']}")


def _watch(client: Client, fit_id: str) -> None:
    bar = Progress(
        TextColumn("{task.fields[method]}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console
    )
    with bar:
        task = bar.add_task(fit_id, total=1.0, method="")
        for found in client.watch_fit(fit_id):
            progress = found["progress"]
            bar.update(task, completed=progress["fraction"], method=progress["method"] or found["state"])
    for warning in found["warnings"]:
        say(warning, style="yellow")
    if found["verdict"] is None:
        refuse(f"the fit is {found['state']}: {found['error']}", code=1)
    say(f"{found['name']} ({found['fitted_method']}): {found['verdict']['decision']}")
    say(found["verdict"]["reason"])
