"""The options of `forwardfill import`. What reads files is imported when the command runs, so that `--help` does not wait."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forwardfill.settings import named_folder


def command(
    gallery: Annotated[str, typer.Argument(help="The gallery; it must be there.")],
    *,
    model: Annotated[str, typer.Option(help="The model that made the vectors.")],
    vectors: Annotated[Path, typer.Option(help="Their file: .npy, .parquet, .arrow, .fvecs, .bvecs, .h5 or .faiss.")],
    kind: Annotated[
        str | None, typer.Option("--format", help="Its format, if its name does not tell: npy, parquet, ...")
    ] = None,
    column: Annotated[
        str | None, typer.Option("--column", "--dataset", help="The vectors, in a file with several columns.")
    ] = None,
    ids: Annotated[Path | None, typer.Option(help="A file of ids: .txt with one per line, .npy, .parquet, ...")] = None,
    id_column: Annotated[str | None, typer.Option(help="The ids; `id` if it is there, else rows are counted.")] = None,
    id_prefix: Annotated[str, typer.Option(help="Put before each id.")] = "",
    side: Annotated[Path | None, typer.Option(help="A file of side-information, row by row.")] = None,
    side_column: Annotated[
        str | None, typer.Option(help="Side-information; `side_information` if it is there.")
    ] = None,
    payload: Annotated[Path | None, typer.Option(help="A file of payloads: .jsonl with one per line, ...")] = None,
    payload_column: Annotated[str | None, typer.Option(help="Payloads; `payload` if it is there.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows per request; a good number unless given.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Where to note how far it came; beside the vectors unless given.")
    ] = None,
    allow_folder: Annotated[
        Path | None,
        typer.Option(
            parser=named_folder, metavar="PATH", help="FAISS indexes may be read from here [FORWARDFILL_IMPORT_FOLDER]."
        ),
    ] = None,
) -> None:
    """Send vectors from files to a running service. Run it again after a crash, and it goes on where it was."""
    from forwardfill.importing import job

    job.carry_out(
        gallery,
        model,
        vectors,
        kind=kind,
        column=column,
        ids=ids,
        id_column=id_column,
        id_prefix=id_prefix,
        side=side,
        side_column=side_column,
        payload=payload,
        payload_column=payload_column,
        batch=batch,
        state=state,
        allow_folder=allow_folder,
    )
