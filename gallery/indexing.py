"""Give a column its index file: chosen by the gallery's settings, built from the column, measured, durable, recorded.

Segments share the centroids of their lists where those find enough in each (`gallery.centroids`).

What is measured is the recall of the column's own rows against exact search. It stands with the index's parameters; where
nothing that `auto` tries finds enough, the column stays without a file, is searched exactly, and its row says so.

Large native segments are searched exactly until a worker has come by; an upgrade builds the index before it publishes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from sqlalchemy import select

from gallery import centroids, faults
from gallery.arrays import Stored
from gallery.catalog import galleries as gallery_rows
from gallery.catalog import models as model_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog.segments import MEASURED, REFUSED
from gallery.catalog.tables import ColumnRow, GalleryRow, ModelRow, SegmentRow
from gallery.catalog.transaction import in_words
from gallery.centroids import Unindexed
from gallery.columns import open_column
from gallery.files import Written, written
from gallery.index import _reach
from gallery.index._recall import Sample, held, recall, sample
from gallery.index.base import JOINED, REACH, Index, ListsBackend, Steered, Trained
from gallery.index.choose import EXACT, RECALL_JOINED, Choice, choose
from gallery.index.quantizer import digest
from gallery.index.registry import backend
from gallery.spaces import EmbeddingModel
from gallery.store import Store, indexes_folder

log = structlog.get_logger()
# A key beside the parameters of an index: the digest of its centroids. A query is compared once with those that segments share.
QUANTIZER = "quantizer"
# Where a larger share of the lists must be read, more lists are tried: of 62,500 vectors in 1,000 clusters, 56 of 100 rows were
# read in 250 lists, and 14 of 100 in 1,000.
MOST_READ = 0.25
# But not where as few rows as these are read of the whole gallery, which takes a tenth of a millisecond.
FEW_ROWS = 1 << 14
# The share of neighbours, of those in the lists that a small part of a shelf reads, that may lie beyond its reach. The farthest
# of 2,000 neighbours is too far to count there, and to reach it, a million rows in 16 segments would read a tenth more.
MISSED_JOINED = 0.005


class Built(NamedTuple):
    """An index file that is durable."""

    kind: str
    parameters: dict[str, Any]
    file: Written
    #: 0 where it has none
    lists: int

    @property
    def share(self) -> float:
        """The share of the lists that a search reads."""
        return min(1.0, self.parameters["nprobe"] / self.lists) if self.lists else 0.0


class Decision(NamedTuple):
    """What a column gets."""

    #: None where it is searched exactly
    built: Built | None
    #: by backend, the recall of those that found too little
    refused: dict[str, float]

    @property
    def files(self) -> list[str]:
        """What was written for it, which no row names yet."""
        return [] if self.built is None else [self.built.file.name]

    def record(self, row: ColumnRow) -> None:
        """Write the decision to the column's row, so that what was refused is not tried again."""
        if self.built is not None:
            segment_rows.set_index(row, self.built.kind, self.built.parameters, self.built.file)
        elif self.refused:
            row.index_parameters = {MEASURED: 1.0, REFUSED: self.refused}


class _FindsTooLittle(Exception):
    """An index was built, and its recall, in `args`, is too low to take it."""


def build(store: Store, gallery: GalleryRow, vectors: Stored, model: EmbeddingModel) -> Decision:
    """Build the index of a new column, which no row names yet."""
    return decide(store, gallery, Unindexed(gallery.id, model, vectors, None))


def decide(store: Store, gallery: GalleryRow, column: Unindexed) -> Decision:
    """Build what the gallery's settings allow until one finds enough of what exact search finds."""
    rows, total = len(column.vectors), centroids.total_rows(store, column)
    choices = choose(gallery.index, rows=rows, exact_below=store.settings.exact_below, total=total)
    if not choices:
        return Decision(None, {})
    asked, refused = sample(column.vectors, column.model.space), dict[str, float]()
    for choice, trained in _attempts(store, column, choices, total):
        try:
            built = _written(store, choice, trained, column, asked)
        except _FindsTooLittle as found:
            refused[choice.kind] = found.args[0]
            continue
        return Decision(_improved(store, choice, built, column, asked, total), refused)
    return Decision(None, refused)


def _improved(store: Store, choice: Choice, built: Built, column: Unindexed, asked: Sample, total: int) -> Built:
    """An index of more lists, if a search reads at most half as much of it; else the one that there is.

    Segments are searched together only where they have the same lists, so other lists must gain much. They are not tried where
    there are more than the usual number already, where that was of no use before, or where an index was asked for by name.
    """
    chosen, few = backend(choice.kind), built.share <= MOST_READ or built.share * total <= FEW_ROWS
    if few or not choice.enough or built.lists >= 2 * sqrt(total) or not isinstance(chosen, ListsBackend):
        return built
    kept = built
    try:
        for trained in centroids.more(store, column, chosen, choice.efforts[0], total):
            other = _halved(store, choice, trained, column, asked, built)
            if other is None:
                in_vain = {centroids.IN_VAIN: len(trained.centroids)} if kept is built else {}
                return kept._replace(parameters=kept.parameters | in_vain)
            store.files.remove([kept.file.name])
            kept = other
    except (OSError, MemoryError, RuntimeError) as error:
        log.info("more_lists_do_not_help", model=column.model.name, rows=len(column.vectors), error=in_words(error))
    return kept


def _halved(
    store: Store, choice: Choice, trained: Trained, column: Unindexed, asked: Sample, built: Built
) -> Built | None:
    """An index of which half as much must be read as of `built`; None where these lists do not make one."""
    try:
        other = _written(store, choice, trained, column, asked)
    except _FindsTooLittle:
        return None
    if 2 * other.share <= built.share:
        return other
    store.files.remove([other.file.name])
    return None


def _written(store: Store, choice: Choice, trained: Trained | None, column: Unindexed, asked: Sample) -> Built:
    """Build an index, durable; raises as `_build`."""
    name = store.files.new(indexes_folder(column.gallery_id), ".faiss")
    with store.files.writing(name) as path:
        parameters = _build(choice, trained, column, path, asked)
    return Built(choice.kind, parameters, written(store.files, name), len(trained.centroids) if trained else 0)


def _attempts(
    store: Store, column: Unindexed, choices: Sequence[Choice], total: int
) -> Iterator[tuple[Choice, Trained | None]]:
    """What to build, each with its lists where it has any. Lists are trained only when what came before was refused."""
    for choice in choices:
        chosen = backend(choice.kind)
        if isinstance(chosen, ListsBackend):
            for trained in centroids.offered(store, column, chosen, choice.efforts[0], total):
                yield choice, trained
        else:
            yield choice, None


def _build(choice: Choice, trained: Trained | None, column: Unindexed, path: Path, asked: Sample) -> dict[str, Any]:
    """Build an index at `path`; returns the first parameters by which it finds enough, and the recall that they give.

    Also the parameters that suffice where the index is a small part of what is searched together: the ten nearest of all are
    nearer than its own ten, and so in fewer lists.

    Raises:
        _FindsTooLittle: it does not find enough by any.
    """
    chosen, vectors, space = backend(choice.kind), column.vectors, column.model.space
    if isinstance(chosen, ListsBackend):
        chosen.build(vectors, space=space, path=path, parameters=choice.efforts[0], trained=trained)
    else:
        chosen.build(vectors, space=space, path=path, parameters=choice.efforts[0])
    faults.reached("build_index")
    opened = chosen.open(vectors, space=space, path=path, parameters=choice.efforts[0])

    def measured(effort: Mapping[str, Any]) -> float:
        """By a search: nothing else proves it."""
        if isinstance(opened, Steered):
            return recall(opened.steered(effort), asked)
        return recall(chosen.open(vectors, space=space, path=path, parameters=effort), asked)

    alone, joined, found = _enough(choice, opened, asked, measured)
    told: dict[str, Any] = {} if trained is None else {QUANTIZER: digest(trained.centroids)}
    nearer = _reaching(choice, trained, column, asked, alone)
    if nearer is not alone:  # it misses no neighbour that was found, but that is for the index to prove
        again = round(measured(nearer), 4)
        alone, found = (nearer, again) if again >= choice.enough else (alone, found)
    if joined is not None:
        joined = _reaching(choice, trained, column, asked, joined, missed=MISSED_JOINED)
        told |= {JOINED: joined} if joined != alone else {}
    return {**alone, **told, MEASURED: found}


def _enough(
    choice: Choice, opened: Index, asked: Sample, measured: Callable[[Mapping[str, Any]], float]
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None, float]:
    """The first effort that finds enough, the first that finds enough as a small part of a joined index, and the former's recall.

    Raises:
        _FindsTooLittle: none does.
    """
    places = opened.places(asked.queries, asked.rows) if isinstance(opened, Steered) and asked.rows.size else None
    found, joined = 0.0, None
    for effort in choice.efforts:
        enough = choice.enough if joined is not None or opened.joins is None else min(RECALL_JOINED, choice.enough)
        if places is not None and effort is not choice.efforts[-1] and held(places, asked, effort["nprobe"]) < enough:
            continue  # they are not in the lists that it reads, and a search would only confirm that
        found = round(measured(effort), 4)
        if opened.joins and joined is None and found >= RECALL_JOINED:
            joined = effort
        if found >= choice.enough:
            return effort, joined, found
    raise _FindsTooLittle(found)


def _reaching(
    choice: Choice,
    trained: Trained | None,
    column: Unindexed,
    asked: Sample,
    effort: Mapping[str, Any],
    *,
    missed: float = 0,
) -> Mapping[str, Any]:
    """The same parameters, and beside them how far a list may be to be read, where that leaves out enough of the lists.

    The parameters of an index that was asked for by name stay as they are.
    """
    chosen = backend(choice.kind)
    if trained is None or not choice.enough or not isinstance(chosen, ListsBackend) or not chosen.reaches:
        return effort
    reach = _reach.measured(trained.centroids, column.vectors, asked, nprobe=effort["nprobe"], missed=missed)
    return effort if reach is None else {**effort, REACH: reach._asdict()}


def wanting(store: Store, limit: int = 16) -> list[int]:
    """Columns that are large enough for an index, have none, and were not found to need exact search."""
    with store.catalog.reading() as session:
        return list(
            session.scalars(
                select(ColumnRow.id)
                .join(SegmentRow)
                .join(GalleryRow)
                .where(
                    ColumnRow.index_file.is_(None),
                    ColumnRow.index_parameters[REFUSED].as_string().is_(None),
                    SegmentRow.retired_at.is_(None),
                    SegmentRow.rows >= store.settings.exact_below,
                    GalleryRow.index["kind"].as_string().is_distinct_from(EXACT),  # it may name none
                )
                .order_by(ColumnRow.id)
                .limit(limit)
            )
        )


def index_column(store: Store, column_id: int) -> bool:
    """Build and publish the index of one column, or record that it has none. Safe to repeat.

    Returns:
        False if the column is gone, has an index already, or needs none.
    """
    with store.catalog.reading() as session:
        column = session.get(ColumnRow, column_id)
        if column is None or column.index_file is not None:
            return False
        segment = session.get_one(SegmentRow, column.segment_id)
        gallery = session.get_one(GalleryRow, segment.gallery_id)
        model = model_rows.as_model(session.get_one(ModelRow, column.model_id))
    vectors = open_column(store.files.path(column.file), rows=segment.rows, dimension=model.dimension)
    decision = decide(store, gallery, Unindexed(gallery.id, model, vectors, column.file))
    if decision.built is None:
        return bool(decision.refused) and _remember(store, column_id, decision)
    with store.catalog.transaction("index") as tx, store.files.unnamed(decision.files):
        gallery_rows.bump(tx.session, gallery.id)
        row = tx.session.get(ColumnRow, column_id)
        if row is not None and row.index_file is None:
            decision.record(row)
            return True
        tx.after.append(lambda: store.files.remove(decision.files))
    return False


def _remember(store: Store, column_id: int, decision: Decision) -> bool:
    """Record that a column is searched exactly, and why. No search sees anything of it, so the version stays."""
    with store.catalog.transaction() as tx:
        row = tx.session.get(ColumnRow, column_id)
        if row is None or row.index_file is not None:
            return False
        decision.record(row)
        return True
