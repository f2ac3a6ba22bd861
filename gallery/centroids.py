"""Which centroids a new index is built with: those of the gallery's newest index of the model, as long as they are good enough.

So segments come to share centroids, and a query is compared with them once for all of these. Nothing else records them: every
index file holds its own, and the next index gets what the newest one holds. New ones are trained, on all of the gallery's
vectors of the model, where there is no index yet, where the gallery has outgrown its centroids, or where an index built with
them finds too little. Indexes that were built before keep theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import func, select

from gallery import errors
from gallery.arrays import Stored
from gallery.catalog.tables import ColumnRow, SegmentRow
from gallery.columns import open_column
from gallery.index import quantizer
from gallery.index.base import ListsBackend, Trained
from gallery.spaces import EmbeddingModel
from gallery.store import Store

# A gallery may have thousands of small segments before they are merged; the largest ones tell enough.
_MOST_COLUMNS = 64
# Where a search would read too large a share of the usual number of lists, so many times as many are tried.
MORE_LISTS = 4
# A key beside the parameters of an index: the number of lists that was tried for it as well, and was no better.
IN_VAIN = "tried_in_vain"


class Unindexed(NamedTuple):
    """A column that is to have an index."""

    gallery_id: int
    model: EmbeddingModel
    vectors: Stored
    #: its name, where a row names it
    file: str | None


def total_rows(store: Store, column: Unindexed) -> int:
    """Rows of the gallery. Lists are made for all of them, although not every segment may have the model yet."""
    with store.catalog.reading() as session:
        there = (SegmentRow.gallery_id == column.gallery_id, SegmentRow.retired_at.is_(None))
        rows = session.scalar(select(func.sum(SegmentRow.rows)).where(*there)) or 0
    return max(int(rows), len(column.vectors))


def offered(
    store: Store, column: Unindexed, chosen: ListsBackend, parameters: Mapping[str, Any], total: int
) -> Iterator[Trained]:
    """Lists to try, one after the other, until an index that is built with them finds enough. Nothing is stored.

    Args:
        store: where the gallery is.
        column: what is to be indexed.
        chosen: the backend that is to use them.
        parameters: its parameters.
        total: rows of the gallery.
    """
    lists = chosen.lists(parameters, total, _trainable(store, column))
    newest = _newest(store, column, chosen)
    if newest is not None and chosen.serves(parameters, len(newest.centroids), lists):
        yield newest
    yield trained(store, column, chosen, lists)


def more(
    store: Store, column: Unindexed, chosen: ListsBackend, parameters: Mapping[str, Any], total: int
) -> Iterator[Trained]:
    """`MORE_LISTS` times the usual number of lists: first roughly trained ones, which show whether it pays to train good ones.

    To train so many takes as long as to transform a hundred thousand items. So none are offered where this number, or half of
    it, was of no use to another segment, or where there are not rows enough to train more than the usual number.
    """
    usual, many = (chosen.lists(parameters, rows, _trainable(store, column)) for rows in (total, MORE_LISTS**2 * total))
    if many > max(usual, 2 * _in_vain(store, column)):
        for care in (quantizer.ROUGH, quantizer.THOROUGH):
            yield trained(store, column, chosen, many, care)


def trained(
    store: Store, column: Unindexed, chosen: ListsBackend, lists: int, care: quantizer.Care = quantizer.THOROUGH
) -> Trained:
    """Train a number of lists, with a sample of all of the gallery's vectors of the model."""
    space = column.model.space
    columns = [*_opened(store, column, _others(store, column)), column.vectors]
    sample = quantizer.training_rows(columns, space, lists, care.rows_per_list)
    return chosen.train(sample, min(lists, len(sample)), space, care.rounds)


def _trainable(store: Store, column: Unindexed) -> int:
    return sum(rows for _, rows in _others(store, column)) + len(column.vectors)


def _in_vain(store: Store, column: Unindexed) -> int:
    """The largest number of lists that was tried for a segment of the gallery and was no better."""
    tried = ColumnRow.index_parameters[IN_VAIN].as_integer()
    with store.catalog.reading() as session:
        there = (SegmentRow.gallery_id == column.gallery_id, ColumnRow.model_id == column.model.id, tried.is_not(None))
        return session.scalar(select(func.max(tried)).select_from(ColumnRow).join(SegmentRow).where(*there)) or 0


def _newest(store: Store, column: Unindexed, chosen: ListsBackend) -> Trained | None:
    """The lists of the newest index of a kind; None where there is none, or it went away just now."""
    with store.catalog.reading() as session:
        name = session.scalar(
            select(func.max(ColumnRow.index_file))  # their names are in the order in which they were made
            .join(SegmentRow)
            .where(
                SegmentRow.gallery_id == column.gallery_id,
                ColumnRow.model_id == column.model.id,
                ColumnRow.index_kind == chosen.name,
            )
        )
    if name is None:
        return None
    try:
        found = chosen.trained(store.files.path(name))
    except RuntimeError:  # which is all that FAISS says of a file that is not there, or not whole
        return None
    return found if found.centroids.shape[1] == column.model.dimension else None


def _others(store: Store, column: Unindexed) -> Sequence[tuple[str, int]]:
    """Names and rows of the gallery's other columns of the model, the largest first."""
    with store.catalog.reading() as session:
        named = session.execute(
            select(ColumnRow.file, SegmentRow.rows)
            .join(SegmentRow)
            .where(
                SegmentRow.gallery_id == column.gallery_id,
                SegmentRow.retired_at.is_(None),
                ColumnRow.model_id == column.model.id,
                ColumnRow.file != (column.file or ""),
            )
            .order_by(SegmentRow.rows.desc(), ColumnRow.id)
            .limit(_MOST_COLUMNS)
        )
        return [(name, rows) for name, rows in named]


def _opened(store: Store, column: Unindexed, named: Sequence[tuple[str, int]]) -> Iterator[Stored]:
    """Those that can be read."""
    for name, rows in named:
        try:
            yield open_column(store.files.path(name), rows=rows, dimension=column.model.dimension)
        except (errors.Damaged, FileNotFoundError):
            continue  # a rollback or a merge took it away; there are others to learn from
