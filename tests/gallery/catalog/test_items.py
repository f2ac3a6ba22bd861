"""To read of some items costs no more where there are many others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sqlalchemy import event, insert, select
from sqlalchemy.orm import Session

from gallery import removal
from gallery.catalog.filters import compile_filter
from gallery.catalog.galleries import gallery_row
from gallery.catalog.items import matching, payloads
from gallery.catalog.tables import ItemRow, SegmentRow
from tests.gallery.steps import steps_of
from tests.gallery.world import GALLERY, OLD, World


def test_the_payloads_of_hits_are_read_without_those_of_other_items(world: World) -> None:
    def read() -> tuple[Mapping[tuple[int, int], Any], int]:
        with world.store.catalog.reading() as session:
            return steps_of(world.store.catalog, lambda: payloads(session, [(1, 3), (2, 0), (1, 1)]))

    for part, rows in (("a", 9), ("b", 9), ("c", 2000)):
        before = read() if part == "c" else None
        ids = [f"{part}{row}" for row in range(rows)]
        world.upsert("old", ids, np.ones((rows, OLD)), payloads=[{"id": item} for item in ids])
    assert read() == before
    assert read()[0] == {(1, 1): {"id": "a1"}, (1, 3): {"id": "a3"}, (2, 0): {"id": "b0"}}


def test_a_gallery_is_deleted_without_a_look_at_the_items_of_others(world: World) -> None:
    def deleted() -> int:
        world.make("small")
        world.upsert("old", ["a", "b"], np.ones((2, OLD)), gallery="small")
        return steps_of(world.store.catalog, lambda: removal.delete_gallery(world.store, "small"))[1]

    deleted()
    before = deleted()
    world.upsert("old", [f"i{row}" for row in range(2000)], np.ones((2000, OLD)))
    assert deleted() < before + 1000
    with world.store.catalog.reading() as session:
        assert set(session.scalars(select(ItemRow.gallery_id))) == {gallery_row(session, GALLERY).id}


def many_segments(session: Session) -> list[tuple[int, int]]:
    """Items in 1,200 segments, two in each; their places. They have no files."""
    gallery = gallery_row(session, GALLERY).id
    segments, items = range(1, 1201), [0, 2]
    file = {"ids_file": "ids", "ids_sha256": "0" * 64, "ids_bytes": 1}
    session.execute(
        insert(SegmentRow),
        [{"id": each, "gallery_id": gallery, "rows": 3, "version": 1, **file} for each in segments],
    )
    session.execute(
        insert(ItemRow),
        [
            {
                "segment_id": each,
                "row": row,
                "gallery_id": gallery,
                "item_id": f"{each}-{row}",
                "payload": {"n": each},
            }
            for each in segments
            for row in items
        ],
    )
    session.flush()
    return [(each, row) for each in segments for row in items]


def test_the_payloads_of_hits_in_however_many_segments_are_read_by_one_statement(each_world: World) -> None:
    statements: list[str] = []
    event.listen(each_world.store.catalog.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    with each_world.store.catalog.transaction() as tx:
        places = many_segments(tx.session)
        statements.clear()
        assert payloads(tx.session, places) == {(each, row): {"n": each} for each, row in places}
        assert len(statements) == 1
        assert payloads(tx.session, places[:1]) == {(1, 0): {"n": 1}}
        assert statements[1] == statements[0]


def test_a_filter_of_many_segments_reads_no_items_of_other_galleries(world: World) -> None:
    condition = compile_filter({"n": 7}, "sqlite")

    def fitting() -> tuple[dict[int, list[int]], int]:
        with world.store.catalog.reading() as session:
            gallery, segments = gallery_row(session, GALLERY).id, {segment for segment, _ in places}
            found, steps = steps_of(world.store.catalog, lambda: matching(session, gallery, segments, condition))
            return {segment: sorted(rows) for segment, rows in found.items() if len(rows)}, steps

    with world.store.catalog.transaction() as tx:
        places = many_segments(tx.session)
    _, before = fitting()
    world.make("other")
    rows = 3000
    world.upsert(
        "old", [f"i{row}" for row in range(rows)], np.ones((rows, OLD)), payloads=[{"n": 7}] * rows, gallery="other"
    )
    found, after = fitting()
    assert found == {7: [0, 2]}
    assert after < before + rows
