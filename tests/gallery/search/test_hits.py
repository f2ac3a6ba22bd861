"""Where hits are found is counted, and what is counted holds on to nothing old."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
from sqlalchemy import select

from gallery.catalog.tables import SegmentRow
from gallery.search.hits import Hits
from tests.gallery.world import OLD, World


def test_hits_of_several_versions_are_all_counted(world: World) -> None:
    hits, asked = Hits(), np.ones((1, OLD), np.float32)
    for at in range(3):
        world.upsert("old", [f"i{at}"], np.eye(OLD, dtype=np.float32)[at : at + 1])
        for _ in range(2):
            hits.count(world.search("old", asked, k=5))
    hits.write(world.store.catalog)
    with world.store.catalog.reading() as session:
        assert list(session.scalars(select(SegmentRow.hits).order_by(SegmentRow.id))) == [6, 4, 2]


def test_an_older_version_goes_when_a_newer_one_was_searched(tmp_path: Path) -> None:
    world = World.open(tmp_path).prepare()
    hits, asked = Hits(), np.ones((1, OLD), np.float32)
    gone = []
    for at in range(2):
        world.upsert("old", [f"i{at}"], np.eye(OLD, dtype=np.float32)[at : at + 1])
        answer = world.search("old", asked)
        hits.count(answer)
        gone.append(weakref.ref(answer.scores))
        del answer
    gc.collect()
    assert [each() is None for each in gone] == [True, False]
    world.close()
