"""Rows of galleries, and what is counted of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy import delete, func, or_, select, union, update
from sqlalchemy.orm import Session

from gallery import errors
from gallery.arrays import Dtype
from gallery.catalog import fits as fit_rows
from gallery.catalog.tables import (
    ArtifactRow,
    ColumnRow,
    FitRow,
    GalleryRow,
    IdentityRow,
    ItemRow,
    ModelRow,
    ProbeRow,
    SearchLatencyRow,
    SegmentRow,
    UpgradeRow,
    UpgradeSegmentRow,
)

_DELETED = "the gallery was deleted meanwhile"


def gallery_row(session: Session, name: str, *, pointer: str | None = None) -> GalleryRow:
    """The row of a gallery; `pointer` says where in a request its name stands.

    Raises:
        GalleryNotFound: none has the name.
    """
    row = session.scalar(select(GalleryRow).where(GalleryRow.name == name))
    if row is None:
        raise errors.GalleryNotFound(f"no gallery is named {name!r}; create it with POST /galleries", pointer=pointer)
    return row


def add_gallery(
    session: Session, *, name: str, model: ModelRow, index: Mapping[str, Any], storage_dtype: Dtype
) -> GalleryRow:
    """Record a gallery without items.

    Raises:
        GalleryExists: another gallery has the name.
    """
    if session.scalar(select(GalleryRow.id).where(GalleryRow.name == name)) is not None:
        raise errors.GalleryExists(f"a gallery is named {name!r} already", pointer="/name")
    row = GalleryRow(name=name, model_id=model.id, index=dict(index), storage_dtype=storage_dtype)
    session.add(row)
    session.flush()
    return row


def lock(session: Session, gallery_id: int) -> None:
    """Lock a gallery's row against other writers, without advancing its version: no search sees a change.

    Raises:
        GalleryNotFound: it was deleted meanwhile.
    """
    if session.scalar(select(GalleryRow.id).where(GalleryRow.id == gallery_id).with_for_update()) is None:
        raise errors.GalleryNotFound(_DELETED)


def free(session: Session, gallery_id: int) -> bool:
    """Lock a gallery's row if no writer has it; whether that succeeded. A deleted gallery has no writers."""
    if session.get(GalleryRow, gallery_id) is None:
        return True
    statement = select(GalleryRow.id).where(GalleryRow.id == gallery_id).with_for_update(skip_locked=True)
    return session.scalar(statement) is not None


def bump(session: Session, gallery_id: int) -> int:
    """Advance a gallery's version and return it.

    Every transaction that changes what a search can see calls this first: the row's lock makes such transactions of one
    gallery follow each other, so each sees what the one before it did.

    Raises:
        GalleryNotFound: it was deleted meanwhile.
    """
    version = session.scalar(
        update(GalleryRow)
        .where(GalleryRow.id == gallery_id)
        .values(version=GalleryRow.version + 1)
        .returning(GalleryRow.version)
        .execution_options(synchronize_session=False)
    )
    if version is None:
        raise errors.GalleryNotFound(_DELETED)
    return version


def items_live(session: Session, gallery_id: int) -> int:
    """Live items of a gallery."""
    return session.scalar(select(func.sum(SegmentRow.live)).where(SegmentRow.gallery_id == gallery_id)) or 0


def of_models(session: Session, models: Sequence[int]) -> dict[int, list[str]]:
    """By model, the names of the galleries that hold vectors of it, or are declared in it."""
    declared = select(GalleryRow.model_id, GalleryRow.name)
    holding = (
        select(ColumnRow.model_id, GalleryRow.name)
        .join(SegmentRow, SegmentRow.id == ColumnRow.segment_id)
        .join(GalleryRow, GalleryRow.id == SegmentRow.gallery_id)
    )
    found: dict[int, list[str]] = {model: [] for model in models}
    either = union(declared.where(GalleryRow.model_id.in_(models)), holding.where(ColumnRow.model_id.in_(models)))
    for model, name in sorted(session.execute(either).all()):
        found[model].append(name)
    return found


def files_of(session: Session, gallery_id: int) -> list[str]:
    """The stored names of all its files."""
    names: list[str] = []
    for segment in session.scalars(select(SegmentRow).where(SegmentRow.gallery_id == gallery_id)):
        names += [name for name in (segment.ids_file, segment.side_file) if name]
    columns = select(ColumnRow).join(SegmentRow).where(SegmentRow.gallery_id == gallery_id)
    for column in session.scalars(columns):
        names += [name for name in (column.file, column.index_file) if name]
    return names


def remove(session: Session, gallery_id: int) -> None:
    """Delete a gallery's rows; its upgrades stay as history."""
    segments = select(SegmentRow.id).where(SegmentRow.gallery_id == gallery_id)
    session.execute(update(UpgradeRow).where(UpgradeRow.gallery_id == gallery_id).values(gallery_id=None, active=False))
    session.execute(delete(UpgradeSegmentRow).where(UpgradeSegmentRow.segment_id.in_(segments)))
    session.execute(delete(ItemRow).where(ItemRow.segment_id.in_(segments)))
    session.execute(delete(ColumnRow).where(ColumnRow.segment_id.in_(segments)))
    session.execute(delete(SegmentRow).where(SegmentRow.gallery_id == gallery_id))
    session.execute(delete(ProbeRow).where(ProbeRow.gallery_id == gallery_id))
    session.execute(delete(SearchLatencyRow).where(SearchLatencyRow.gallery_id == gallery_id))
    session.execute(delete(GalleryRow).where(GalleryRow.id == gallery_id))


#: where rows name files; an artifact's name is its digest
_NAMES = (
    ColumnRow.file,
    ColumnRow.index_file,
    SegmentRow.ids_file,
    SegmentRow.side_file,
    FitRow.ids_file,
    FitRow.vectors_file,
    FitRow.labels_file,
)


def known_file(session: Session) -> Callable[[str], bool]:
    """Whether any row names a file; one that none names may be reclaimed.

    Each call asks the catalog, because a row may come to name the file until then.
    """

    def known(name: str) -> bool:
        columns = select(ColumnRow.id).where(or_(ColumnRow.file == name, ColumnRow.index_file == name)).limit(1)
        segments = select(SegmentRow.id).where(or_(SegmentRow.ids_file == name, SegmentRow.side_file == name)).limit(1)
        artifact = PurePosixPath(name).stem
        return (
            session.scalar(columns) is not None
            or session.scalar(segments) is not None
            or session.get(ArtifactRow, artifact) is not None
            or fit_rows.names_file(session, name)
        )

    return known


def known_files(session: Session, folder: str) -> Callable[[str], bool]:
    """As `known_file`, for many files of one folder: all names are read at once, and later calls answer from them."""
    names: set[str] = set()
    for column in _NAMES:
        names.update(session.scalars(select(column).where(column.startswith(f"{folder}/", autoescape=True))))
    artifacts = set(session.scalars(select(ArtifactRow.sha256)))
    return lambda name: name in names or PurePosixPath(name).stem in artifacts


def names_files(session: Session) -> bool:
    """Whether any row names a file."""
    firsts = [*(select(column).where(column.is_not(None)) for column in _NAMES), select(ArtifactRow.sha256)]
    return any(session.scalar(first.limit(1)) is not None for first in firsts)


def identity(session: Session) -> str:
    """Which catalog this is."""
    return session.scalars(select(IdentityRow.id)).one()
