"""One import from what the command line says: find the columns, ask the service what it takes, run the loop under a bar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from forwardfill.connection import connected
from forwardfill.importing.column import BadInput, Column
from forwardfill.importing.command import ImportOptions
from forwardfill.importing.formats import FORMATS, columns, pick
from forwardfill.importing.rows import Rows
from forwardfill.importing.run import run
from forwardfill.importing.state import State, digest
from forwardfill.settings import ClientSettings
from forwardfill.terminal import console, refuse, say


def carry_out(options: ImportOptions) -> None:
    """Do what the options say; exit with 2 where the input is bad, with 1 where the service refuses or is away."""
    if options.kind is not None and options.kind not in FORMATS:
        refuse(f"--format is one of {', '.join(FORMATS)}, not {options.kind}")
    gallery, model, vectors = options.gallery, options.model, options.vectors
    allowed = options.allow_folder or ClientSettings().import_folder
    try:
        found = columns(vectors, kind=options.kind, allowed=allowed)
        embeddings = pick(found, options.column, "embedding", vectors=True, path=vectors, option="--column")
        id_rows = _beside(found, options.ids, options.id_column, "id", "--id-column", embeddings)
        side_rows = _beside(found, options.side, options.side_column, "side_information", "--side-column", embeddings)
        payloads = _beside(found, options.payload, options.payload_column, "payload", "--payload-column", embeddings)
        with connected() as client:
            made_by, kept_in = client.model(model), client.gallery(gallery)
            rows = Rows(
                embeddings,
                made_by["dimension"],
                ids=id_rows,
                id_prefix=options.id_prefix,
                side=side_rows,
                side_dimension=(made_by["side_information"] or {}).get("dimension"),
                payloads=payloads,
            )
            named = {name: each.name for name, each in rows.columns().items()}
            # The time tells a gallery that was deleted and made again, which has none of the rows, from the earlier one.
            target = {"gallery": gallery, "created_at": kept_in["created_at"], "model": model}
            files = [each.path for each in rows.columns().values()]
            progress = State(
                options.state or vectors.with_name(f"{vectors.name}.{gallery}.import.json"),
                digest(files, {**target, "columns": named, "prefix": options.id_prefix, "format": options.kind}),
            )
            with _Bar(len(rows)) as bar:
                run(client, gallery, model, rows, progress, batch=options.batch, stored=bar.show)
    except BadInput as error:
        refuse(str(error))
    say(f"{gallery}: all {len(rows)} rows are stored")


def _beside(
    found: Sequence[Column], file: Path | None, name: str | None, usual: str, option: str, embeddings: Column
) -> Column | None:
    """A column beside the vectors, from a file of its own or from theirs, by its name or the usual one; None if there is none."""
    vectors = usual == "side_information"
    if file is not None:
        return pick(columns(file), name, usual, vectors=vectors, path=file, option=option)
    if name is None and all(each.name != usual for each in found):
        return None
    return pick(found, name or usual, usual, vectors=vectors, path=embeddings.path, option=option)


class _Bar:
    """A progress bar; without a terminal, a line for each batch."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bar = Progress(
            TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        self._task = self._bar.add_task("rows", total=total)
        self._first = True

    def __enter__(self) -> _Bar:
        if console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self._bar.stop()

    def show(self, stored: int) -> None:
        """Show how many rows are stored."""
        if self._first and stored:
            say(f"goes on behind row {stored - 1}, where an earlier run ended")
        self._first = False
        if console.is_terminal:
            self._bar.update(self._task, completed=stored)
        else:
            say(f"{stored} of {self._total} rows")
