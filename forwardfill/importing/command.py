"""The options of `forwardfill import`. What reads files is imported when the command runs, so that `--help` does not wait."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from forwardfill.settings import named_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What the command line says; each field is one of its options, and what it means is its help."""

    gallery: Annotated[str, typer.Argument(help="The gallery; it must be there.")]
    model: Annotated[str, typer.Option(help="The model that made the vectors.")]
    vectors: Annotated[Path, typer.Option(help="Their file: .npy, .parquet, .arrow, .fvecs, .bvecs, .h5 or .faiss.")]
    kind: Annotated[
        str | None, typer.Option("--format", help="Its format, if its name does not tell: npy, parquet, ...")
    ] = None
    column: Annotated[
        str | None, typer.Option("--column", "--dataset", help="The vectors, in a file with several columns.")
    ] = None
    ids: Annotated[Path | None, typer.Option(help="A file of ids: .txt with one per line, .npy, .parquet, ...")] = None
    id_column: Annotated[str | None, typer.Option(help="The ids; `id` if it is there, else rows are counted.")] = None
    id_prefix: Annotated[str, typer.Option(help="Put before each id.")] = ""
    side: Annotated[Path | None, typer.Option(help="A file of side-information, row by row.")] = None
    side_column: Annotated[str | None, typer.Option(help="Side-information; `side_information` if it is there.")] = None
    payload: Annotated[Path | None, typer.Option(help="A file of payloads: .jsonl with one per line, ...")] = None
    payload_column: Annotated[str | None, typer.Option(help="Payloads; `payload` if it is there.")] = None
    batch: Annotated[int | None, typer.Option(min=1, help="Rows per request; a good number unless given.")] = None
    state: Annotated[
        Path | None, typer.Option(help="Where to note how far it came; beside the vectors unless given.")
    ] = None
    allow_folder: Annotated[
        Path | None,
        typer.Option(
            parser=named_folder, metavar="PATH", help="FAISS indexes may be read from here [FORWARDFILL_IMPORT_FOLDER]."
        ),
    ] = None


def command(**given: Any) -> None:
    """Send vectors from files to a running service. Run it again after a crash, and it goes on where it was."""
    from forwardfill.importing import job

    job.carry_out(ImportOptions(**given))


# Typer reads a command's options from its signature. So that each is written down once, it reads them from the fields.
command.__signature__ = inspect.signature(ImportOptions, eval_str=True)  # type: ignore[attr-defined]
