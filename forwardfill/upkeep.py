"""What `forwardfill verify` and `forwardfill gc` print: is everything there that should be, and what is there beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from gallery import verify as checks
from gallery.catalog.galleries import known_file
from gallery.catalog.transaction import Catalog
from gallery.files import Files
from gallery.verify import Report

#: where files are that rows name
FOLDERS = ("columns", "indexes", "artifacts", "fits")
console = Console()


def verify(catalog: Catalog, data: Path, gallery: str | None) -> int:
    """Check one gallery, or all of them and the artifacts; returns how much is wrong.

    Raises:
        GalleryNotFound: none has the name.
    """
    files, reports = Files(data), dict[str, Report]()
    with Progress(console=console, transient=True) as progress:
        for name in [gallery] if gallery is not None else checks.names(catalog):
            task = progress.add_task(escape(name), total=1.0)
            reports[name] = checks.gallery(catalog, files, name, step=partial(_advance, progress, task))
    everything = [*reports.items(), *([("(artifacts)", checks.artifacts(catalog, files))] if gallery is None else [])]
    _tell(everything)
    return sum(len(report.problems) for _, report in everything)


def collect(catalog: Catalog, data: Path, older_than: float, *, delete: bool) -> None:
    """List the files that no row names and that were not touched for so many seconds, and remove them if told to.

    What a running search needs is never among them: a snapshot opens its files only while rows name them, and keeps the
    bytes of what is removed later.
    """
    files, table, total = Files(data), Table("file", "bytes", "age"), 0
    names = _unneeded(catalog, files, older_than)
    for name in names:
        status = files.path(name).stat()
        table.add_row(escape(name), f"{status.st_size:,}", f"{(time.time() - status.st_mtime) / 3600:.1f} h")
        total += status.st_size
    if names:
        console.print(table)
    if delete:
        for folder in FOLDERS:
            with catalog.reading() as session:  # asked again: nothing that was named meanwhile may go
                files.sweep(folder, known=known_file(session), older_than=older_than)
    done = "removed" if delete else "not needed" + ("; repeat with --delete to remove them" if names else "")
    console.print(f"{len(names)} files, {total:,} bytes: {done}")


def _advance(progress: Progress, task: TaskID, done: float) -> None:
    progress.update(task, completed=done)


def _unneeded(catalog: Catalog, files: Files, older_than: float) -> Sequence[str]:
    with catalog.reading() as session:
        known = known_file(session)
        return [name for folder in FOLDERS for name in files.unknown(folder, known=known, older_than=older_than)]


def _tell(reports: Sequence[tuple[str, Report]]) -> None:
    table = Table("gallery", "segments", "items", "files", "bytes", "problems")
    for name, report in reports:
        counts = (report.segments, report.items, report.files, report.bytes, len(report.problems))
        table.add_row(escape(name), *(f"{count:,}" for count in counts))
    console.print(table)
    for name, report in reports:
        for problem in report.problems:
            where = [f"segment {problem.segment}"] if problem.segment is not None else []
            where += [problem.file] if problem.file is not None else []
            console.print(f"[red]{escape(': '.join([name, ', '.join(where), problem.what]))}[/red]", soft_wrap=True)
