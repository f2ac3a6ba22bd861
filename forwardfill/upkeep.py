"""What `forwardfill verify` and `forwardfill gc` do and print: is all there that should be, and what is there beside it?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table
from sqlalchemy.exc import OperationalError

from forwardfill.refusals import is_read_only
from forwardfill.terminal import console, refuse, say, show
from gallery import folder, orphans, repair
from gallery import verify as checks
from gallery.catalog.transaction import Catalog
from gallery.errors import GalleryNotFound
from gallery.files import Files
from gallery.repair import Outcome
from gallery.store import Store

#: checks the gallery of a name, and calls the function with how far it is, 0 to 1
Look = Callable[[str, Callable[[float], None]], Outcome]


def verify(catalog: Catalog, files: Files, gallery: str | None) -> int:
    """Check one gallery, or all of them and the artifacts; returns how much is wrong.

    Raises:
        GalleryNotFound: none has the name.
    """
    return _look(
        catalog, files, gallery, lambda name, step: Outcome(checks.gallery(catalog, files, name, step=step), ())
    )


def mend(store: Store, gallery: str | None) -> int:
    """As `verify`, and make damaged files anew where what they are made from is whole; returns how much is still wrong.

    Raises:
        GalleryNotFound: none has the name.
    """
    return _look(store.catalog, store.files, gallery, partial(_mend, store))


def _mend(store: Store, name: str, step: Callable[[float], None]) -> Outcome:
    return repair.gallery(store, name, actor="forwardfill verify --repair", step=step)


def _look(catalog: Catalog, files: Files, gallery: str | None, look: Look) -> int:
    found = dict[str, Outcome]()
    if gallery is None:  # first, since what is derived may have to be derived again
        found["(artifacts)"] = Outcome(checks.artifacts(catalog, files), ())
    with Progress(console=console, transient=True) as progress:
        for name in [gallery] if gallery is not None else checks.names(catalog):
            task = progress.add_task(escape(name), total=1.0)
            try:
                found[name] = look(name, partial(_advance, progress, task))
            except GalleryNotFound:
                if gallery is not None:
                    raise
                progress.remove_task(task)  # deleted meanwhile, so nothing of it can be wrong
    _tell(found)
    return sum(len(each.report.problems) for each in found.values())


def collect(catalog: Catalog, files: Files, older_than: float, *, delete: bool) -> None:
    """List the files that no row names and that were not touched for so many seconds, and remove them if told to.

    What a running search needs is never among them: a snapshot opens its files only while rows name them, and keeps the
    bytes of what is removed later.

    Raises:
        ForeignFolderError: they would be removed, and as `folder.check`.
    """
    if delete:
        folder.check(catalog, files)
    try:
        _collect(catalog, files, older_than, delete=delete)
    except OperationalError as error:
        if is_read_only(error):
            raise
        refuse(f"The catalog is busy or does not answer, so nothing more is removed; try again: {error.orig}")


def _collect(catalog: Catalog, files: Files, older_than: float, *, delete: bool) -> None:
    table, sizes = Table("file", "bytes", "age"), dict[str, int]()
    for place in orphans.FOLDERS:
        for name in orphans.found(catalog, files, place, older_than=older_than):
            with suppress(FileNotFoundError):  # another process removed it meanwhile
                status = files.path(name).stat()
                sizes[name] = status.st_size
                table.add_row(name, f"{status.st_size:,}", f"{(time.time() - status.st_mtime) / 3600:.1f} h")
    if sizes:
        show(table)
    if not delete:
        _count(sizes, "not needed" + ("; repeat with --delete to remove them" if sizes else ""))
        return
    removed = {
        name for place in orphans.FOLDERS for name in orphans.remove(catalog, files, place, older_than=older_than)
    }
    _count({name: size for name, size in sizes.items() if name in removed}, "removed")
    if left := sizes.keys() - removed:
        say(f"{len(left)} are left: they were named meanwhile, or their gallery is being written to")


def _count(sizes: Mapping[str, int], what: str) -> None:
    say(f"{len(sizes)} files, {sum(sizes.values()):,} bytes: {what}")


def _advance(progress: Progress, task: TaskID, done: float) -> None:
    progress.update(task, completed=done)


def _tell(found: Mapping[str, Outcome]) -> None:
    table = Table("gallery", "segments", "items", "files", "bytes", "repaired", "problems")
    for name, (report, mended) in found.items():
        counts = (report.segments, report.items, report.files, report.bytes, len(mended), len(report.problems))
        table.add_row(name, *(f"{count:,}" for count in counts))
    show(table)
    for name, (report, mended) in found.items():
        for each in mended:
            _tell_one(
                "green", name, each.segment, each.file, each.what if each.file is None else f"was damaged; {each.what}"
            )
        for problem in report.problems:
            _tell_one("red", name, problem.segment, problem.file, problem.what)


def _tell_one(colour: str, name: str, segment: int | None, file: str | None, what: str) -> None:
    segments = [] if segment is None else [f"segment {segment}"]
    files = [] if file is None or file in what else [file]
    say(": ".join([name, *segments, *files, what]), style=colour)
