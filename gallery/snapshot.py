"""What one search sees: all live segments of a gallery, their columns and deletions at one version; immutable.

`Galleries` is the mutable holder of a process. Readers take `current` once and keep it; `refresh` reads what changed in
the catalog, opens what is new, and swaps. Nothing that a reader holds ever changes under it.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import structlog
from sqlalchemy import Row, Select, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from gallery import errors, faults
from gallery.catalog import items as item_rows
from gallery.catalog import models as model_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ColumnRow, GalleryRow, SegmentRow
from gallery.catalog.transaction import Catalog, in_words
from gallery.commits import Commits
from gallery.files import Files
from gallery.shelves import Place, Shelf, shelved
from gallery.spaces import EmbeddingModel, Registry
from gallery.views import Column, SegmentView, open_searchable, open_segment, still_open, without

_OPEN_ATTEMPTS = 5
#: What was left out because it could not be opened may only have met a moment without memory or file descriptors.
_LOOK_AGAIN_SECONDS = 5.0
_NAMED = 500  # rows in one statement
log = structlog.get_logger()
#: what files that are gone or damaged make the libraries raise
_UNREADABLE = (errors.Damaged, OSError, RuntimeError, MemoryError)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A gallery at one version."""

    gallery_id: int
    gallery: str
    version: int
    #: name of the gallery's model
    model: str
    segments: tuple[SegmentView, ...]
    #: the same segments, as they are searched
    shelves: tuple[Shelf, ...]
    #: models that a finalized upgrade left behind
    retired: frozenset[str]
    #: (source, target) -> name of the transformation that an upgrade is pinned to
    pinned: Mapping[tuple[str, str], str]
    #: names of transformations that may take zeros for missing side-information
    zeros_for: frozenset[str]
    #: by the monotonic clock: when to open it again even if nothing changed, because something had to be left out
    look_again_at: float = math.inf

    @property
    def live(self) -> int:
        """Live items."""
        return sum(segment.live for segment in self.segments)

    def of(self, segments: Iterable[SegmentView]) -> Snapshot:
        """The same with other segments."""
        views = tuple(segments)
        return replace(self, segments=views, shelves=shelved(views, self.shelves))


@dataclass(frozen=True, slots=True)
class World:
    """Everything a search needs, at one moment; immutable."""

    registry: Registry
    registry_mark: tuple[int, int]
    galleries: Mapping[str, Snapshot]
    #: galleries whose files cannot be opened, and as what and why their users are refused; the others go on
    damaged: Mapping[str, tuple[type[errors.GalleryError], str]]
    #: where `gallery.search` keeps the plans that it made for this world
    memo: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def snapshot(self, gallery: str) -> Snapshot:
        """The snapshot of a gallery.

        Raises:
            GalleryNotFound: this process knows no such gallery.
            Damaged: its files could not be opened.
            TooManyFiles: they could not, but only because so many are open.
        """
        found = self.galleries.get(gallery)
        if gallery in self.damaged:
            kind, why = self.damaged[gallery]
            raise kind(f"gallery {gallery!r} cannot be opened: {why}")
        if found is None:
            raise errors.GalleryNotFound(f"no gallery is named {gallery!r}; create it with POST /galleries")
        return found

    def model(self, name: str, *, pointer: str | None = None) -> EmbeddingModel:
        """A registered model; `pointer` says where in a request its name stands.

        Raises:
            ModelNotFound: none has the name.
        """
        found = self.registry.models.get(name)
        if found is None:
            raise errors.ModelNotFound(
                f"no model is registered as {name!r}; register it with POST /models", pointer=pointer
            )
        return found


class _Newest(NamedTuple):
    """A gallery as the catalog has it now."""

    id: int
    name: str
    version: int
    model_id: int


_NOTHING = World(Registry({}, ()), (0, 0), MappingProxyType({}), MappingProxyType({}))


class Galleries:
    """The snapshots of this process."""

    def __init__(
        self,
        catalog: Catalog,
        files: Files,
        place: Place | None = None,
        commits: Commits | None = None,
        *,
        only_asked_for: bool = False,
    ) -> None:
        """Start with nothing; call `refresh`.

        Args:
            catalog: where facts are.
            files: where vectors are.
            place: says where indexes live; None leaves them where they were opened.
            commits: of the processes behind the same port, where there are several.
            only_asked_for: open only galleries that `refresh` was asked for. To open all takes long where there are thousands.
        """
        self._catalog = catalog
        self._files = files
        self._place = place
        self._commits = commits
        #: the only galleries that are opened; None where all are
        self._asked_for: set[str] | None = set() if only_asked_for else None
        #: what others had announced before the last refresh, and what they announced that is not waited for any more
        self._seen = self._forgone = b""
        #: whether anything changed here since the last announcement of our own
        self._news = False
        #: by the monotonic clock: when the reading of what is current began
        self._read_at = -math.inf
        self._lock = threading.Lock()
        self.current = _NOTHING

    def refresh(self, gallery: str | None = None) -> World:
        """Read what changed since the last refresh, and swap. Returns what is current now, in which `gallery` is.

        A file may be removed between the read of its row and its opening, by a rollback or finalize; then the rows are read
        again, which no longer name it. A gallery that stays unreadable is reported by `World.snapshot`, to its users only.
        """
        with self._lock:
            if self._asked_for is not None and gallery is not None:
                self._asked_for.add(gallery)
            return self._refreshed()

    def announced(self) -> World:
        """Refresh, and tell the processes behind the same port that there is news.

        To be called before a client is answered: whichever of them gets its next search, that sees what the client was told.
        """
        asked = time.monotonic()
        with self._lock:
            # A reading that began since then has seen what the caller did: of clients that write at once, not each needs its own.
            if self._read_at <= asked:
                self._refreshed()
            if self._commits is not None and self._news:
                self._commits.announce()
                self._news = False
            return self.current

    def let_go(self) -> None:
        """Close everything. A removed file takes place on the disk for as long as somebody has it mapped."""
        with self._lock:
            self.current = _NOTHING
            if self._asked_for is not None:
                self._asked_for.clear()

    @property
    def behind(self) -> bytes | None:
        """What other processes behind the same port have announced, where that may not be in `current` yet; else None."""
        if self._commits is None:
            return None
        others = self._commits.of_others()
        return None if others in (self._seen, self._forgone) else others

    def forgo(self, behind: bytes) -> None:
        """Do not wait for these announcements any more: what they tell of could not be read in time. `behind` leaves them out."""
        self._forgone = behind

    def _refreshed(self) -> World:
        # Read before the catalog is: what is announced from now on may not be in there.
        seen = b"" if self._commits is None else self._commits.of_others()
        began = time.monotonic()
        newer = self.current
        for left in reversed(range(_OPEN_ATTEMPTS)):
            newer = self._newer(newer, leave_out=left == 0)
            if not newer.damaged:
                break
        self._news |= newer is not self.current
        self.current = newer
        self._seen, self._read_at = seen, began
        return self.current

    def _newer(self, old: World, *, leave_out: bool) -> World:
        galleries: dict[str, Snapshot] = {}
        damaged: dict[str, tuple[type[errors.GalleryError], str]] = {}
        with self._catalog.reading() as session:
            mark = model_rows.registry_mark(session)
            registry = old.registry if mark == old.registry_mark else model_rows.registry(session)
            versions = select(GalleryRow.id, GalleryRow.name, GalleryRow.version, GalleryRow.model_id)
            if self._asked_for is not None:
                versions = versions.where(GalleryRow.name.in_(self._asked_for))
            for row in session.execute(versions).all():
                newest = _Newest(*row)
                name, before = newest.name, old.galleries.get(newest.name)
                try:
                    galleries[name] = self._snapshot(session, newest, registry, before, leave_out=leave_out)
                except _UNREADABLE as error:
                    damaged[name] = _refused_as(error), str(error)
                    if before is not None:
                        galleries[name] = before  # what is open may still be of use once the files are mended
        # Joining indexes may take a while, and needs no database.
        for name, snapshot in list(galleries.items()):
            before = old.galleries.get(name)
            try:
                galleries[name] = _on_shelves(snapshot, before, self._place)
            except _UNREADABLE as error:
                damaged[name] = _refused_as(error), str(error)
                if before is None:
                    del galleries[name]
                else:
                    galleries[name] = before
        found = World(registry, mark, MappingProxyType(galleries), MappingProxyType(damaged))
        return old if _same(old, found) else found

    def _snapshot(
        self,
        session: Session,
        newest: _Newest,
        registry: Registry,
        old: Snapshot | None,
        *,
        leave_out: bool,
    ) -> Snapshot:
        if old is not None and old.gallery_id != newest.id:
            old = None  # deleted, and created anew under its name
        if old is not None and old.version == newest.version and time.monotonic() < old.look_again_at:
            return old
        faults.reached("refresh")
        return _load(session, self._files, newest, registry, old, leave_out=leave_out)


def _on_shelves(snapshot: Snapshot, before: Snapshot | None, place: Place | None) -> Snapshot:
    if snapshot is before:
        return snapshot
    return replace(snapshot, shelves=shelved(snapshot.segments, () if before is None else before.shelves, place))


def _refused_as(error: Exception) -> type[errors.GalleryError]:
    lacks = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    return errors.TooManyFiles if lacks else errors.Damaged


def _same(one: World, other: World) -> bool:
    """Whether nothing changed: then plans that were made hold."""
    return (
        one.registry is other.registry
        and one.damaged == other.damaged
        and one.galleries.keys() == other.galleries.keys()
        and all(one.galleries[name] is other.galleries[name] for name in one.galleries)
    )


def _load(
    session: Session, files: Files, gallery: _Newest, registry: Registry, old: Snapshot | None, *, leave_out: bool
) -> Snapshot:
    opened = {view.id: view for view in old.segments} if old else {}
    columns, whole = _columns(session, files, registry, gallery.id, opened, leave_out=leave_out)
    deleted = item_rows.deleted_since(session, gallery.id, old.version if old else -1)
    there = (SegmentRow.gallery_id == gallery.id, SegmentRow.retired_at.is_(None))
    listed = session.execute(select(SegmentRow.id, SegmentRow.ids_file).where(*there).order_by(SegmentRow.id)).all()
    new = {segment for segment, _ in listed if segment not in opened}
    segments = {each.id: each for (each,) in _rows_of(session, select(SegmentRow).where(*there), SegmentRow.id, new)}
    views = [
        without(
            still_open(files, opened[segment], ids_file, columns.get(segment, {}))
            if segment in opened
            else open_segment(files, segments[segment], columns.get(segment, {})),
            deleted.get(segment),
        )
        for segment, ids_file in listed
    ]
    pins = upgrade_rows.pins(session, gallery.id)
    return Snapshot(
        gallery_id=gallery.id,
        gallery=gallery.name,
        version=gallery.version,
        model=next(model.name for model in registry.models.values() if model.id == gallery.model_id),
        segments=tuple(views),
        shelves=(),
        retired=pins.retired,
        pinned=pins.pinned,
        zeros_for=pins.zeros_for,
        look_again_at=math.inf if whole else time.monotonic() + _LOOK_AGAIN_SECONDS,
    )


def _columns(
    session: Session,
    files: Files,
    registry: Registry,
    gallery_id: int,
    opened: Mapping[int, SegmentView],
    *,
    leave_out: bool,
) -> tuple[dict[int, dict[str, Column]], bool]:
    """Published columns by segment and model, those that are open already taken over; and whether these are all of them.

    With `leave_out`, a derived column that cannot be opened is left out if its source is there. Until it is made anew, its rows
    are mapped at query time, as they were before the column was made.
    """
    known = {column.id: column for view in opened.values() for column in view.columns.values()}
    names = {model.id: model for model in registry.models.values()}
    found, whole = dict[int, dict[str, Column]](), True
    published = (SegmentRow.gallery_id == gallery_id, SegmentRow.retired_at.is_(None), ColumnRow.published)
    listed = session.execute(
        select(ColumnRow.id, ColumnRow.segment_id, ColumnRow.model_id, ColumnRow.index_file)
        .join(SegmentRow)
        .where(*published)
        .order_by(ColumnRow.id)
    ).all()
    there = {(segment, names[model].name) for _, segment, model, _ in listed}
    new = {each for each, _, _, index in listed if each not in known or known[each].index_file != index}
    asked = select(ColumnRow, SegmentRow.rows).join(SegmentRow).where(*published)
    rows = {row.id: (row, count) for row, count in _rows_of(session, asked, ColumnRow.id, new)}
    for each, segment, model_id, index_file in listed:
        model = names[model_id]
        if each not in new:
            column = known[each]
        else:
            row, count = rows[each]
            try:
                column = open_searchable(files, row, model, count)
            except (errors.Damaged, OSError) as error:
                if not leave_out or not row.lineage or (segment, row.lineage[-1]["source"]) not in there:
                    raise
                log.warning("column_left_out", segment=segment, model=model.name, error=in_words(error))
                whole = False
                continue
        whole &= column.index_file == index_file
        found.setdefault(segment, {})[model.name] = column
    return found, whole


def _rows_of(
    session: Session, statement: Select[*tuple[Any, ...]], column: InstrumentedAttribute[int], ids: Collection[int]
) -> Iterable[Row[*tuple[Any, ...]]]:
    """Rows of these ids; of all, where they are many. To read what is open already would take most of the time of a refresh."""
    if not ids:
        return ()
    return session.execute(statement if len(ids) > _NAMED else statement.where(column.in_(ids)))
