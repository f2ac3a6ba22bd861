"""The same search without an index: every live row is scored in the score space, a block at a time.

It takes as long as reading and transforming the whole gallery. What it finds is what a gallery holds, however its columns are
indexed and whichever of them are made already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from gallery.arrays import Rows, Stored, Vectors
from gallery.index.registry import backend
from gallery.search.mapped import Asked, By, MappedColumns
from gallery.search.merge import Part, merge, single
from gallery.search.request import Answer, SearchRequest
from gallery.search.run import Run, Searcher, ready_plan
from gallery.snapshot import World
from gallery.views import SegmentView

_ROWS_AT_ONCE = 8192


def search_exactly(
    searcher: Searcher, world: World, gallery: str, request: SearchRequest, between: Callable[[], None] = lambda: None
) -> Answer:
    """Score every row for a request.

    Args:
        searcher, world, gallery, request: as for `Searcher.search`.
        between: is called before each block of rows; what it raises ends the search.

    Raises:
        GalleryError: as `Searcher.search`.
    """
    return Exact(searcher.begin(world, gallery, request), between).answer()


class Exact(Run):
    """A search for which every row is a candidate. What it maps is not kept: it would push out what searches use."""

    def __init__(self, run: Run, between: Callable[[], None] = lambda: None) -> None:
        """Ask what `run` asks, of the same snapshot, by the same plan and filter."""
        ways = tuple(way and way._replace(exhaustive=True) for way in run.plan.ways)
        ready = ready_plan(run.snapshot, replace(run.plan, ways=ways))
        forgetful = replace(run.searcher, mapped=MappedColumns(run.searcher.transforms, 0))
        super().__init__(forgetful, run.world, run.snapshot, run.request, ready, run.filtered)
        self._between = between

    def _ask(self, at: int, model: str, k: int, *, roughly: bool = False) -> Part:  # noqa: ARG002 - k is the request's
        return self._all(at, lambda view, rows: view.columns[model].vectors[rows])

    def _ask_mapped(self, at: int, column: str, by: By) -> Iterator[Part]:
        def mapped(view: SegmentView, rows: Rows) -> Vectors:
            return self.searcher.mapped.take([Asked(view.columns[column], view.side, rows)], by, self.models)

        yield self._all(at, mapped)

    def _all(self, at: int, take: Callable[[SegmentView, Rows], Stored]) -> Part:
        """The best rows of one shelf, whose vectors in the score space `take` gives."""
        shelf, selected = self.snapshot.shelves[at], self._selected(at)
        rows = np.arange(shelf.rows) if selected is None else selected.rows

        def parts() -> Iterator[Part]:
            for position, view, own in shelf.of(rows):
                for start in range(0, len(own), _ROWS_AT_ONCE):
                    self._between()
                    block = own[start : start + _ROWS_AT_ONCE]
                    yield single(position, *self._block(block, take(view, block)))

        return self._best(parts())

    def _block(self, rows: Rows, vectors: Stored) -> tuple[Vectors, Rows]:
        """Scores and rows of the best of some rows."""
        index = backend("flat").open(vectors, space=self.target.space, path=None, parameters={})
        found = index.search(self._query(self.target.name), min(self.request.k, len(rows)))
        return found.scores, np.where(found.rows < 0, -1, rows[found.rows])

    def _best(self, parts: Iterable[Part]) -> Part:
        """The best of many parts, one after the other, so that few are kept."""
        best = merge([], self.request.k, self.target.metric, len(self.request.vectors))
        for part in parts:
            best = merge([best, part], self.request.k, self.target.metric, len(self.request.vectors))
        return best
