"""What galleries hold is told of each as if it were alone, in as many statements as one takes."""

from __future__ import annotations

import numpy as np
from sqlalchemy import event

from gallery.catalog.galleries import gallery_row
from gallery.catalog.holdings import Held, Holding, holdings
from tests.gallery.steps import steps_of
from tests.gallery.world import GALLERY, OLD, SIDE, World


def test_several_galleries_are_counted_apart_in_the_statements_of_one(each_world: World) -> None:
    world = each_world
    for name in ("bare", "empty"):
        world.make(name)
    vectors, side = np.ones((4, OLD)), np.ones((4, SIDE))
    for part in "ab":
        world.upsert("old", [f"{part}{row}" for row in range(4)], vectors, side=side)
    world.upsert("old", ["a0"], vectors[:1], gallery="bare")
    world.delete("a0", "b0", "b1")
    upgrade = world.start()
    while not world.step(upgrade) or len(world.galleries.refresh().snapshot(GALLERY).segments[0].columns) < 2:
        pass

    statements: list[str] = []
    event.listen(world.store.catalog.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    with world.store.catalog.reading() as session:
        ids = {name: gallery_row(session, name).id for name in (GALLERY, "bare", "empty")}
        statements.clear()
        found = holdings(session, ids.values())
        together = len(statements)
        statements.clear()
        alone = {name: holdings(session, [gallery])[gallery] for name, gallery in ids.items()}
    assert together * 3 == len(statements)
    assert {name: found[gallery] for name, gallery in ids.items()} == alone

    photos, bare = found[ids[GALLERY]], found[ids["bare"]]
    assert (photos.items, photos.segments, photos.side_items) == (5, 2, 5)
    assert [(name, each.native_items, each.derived_items) for name, each in photos.models.items()] == [
        ("new", 0, 3),
        ("old", 5, 0),
    ]
    ((lineage, items),) = photos.models["new"].lineages.items()
    assert ([step.transformation for step in lineage], items) == (["forward"], 3)
    assert (bare.items, bare.segments, bare.side_items, bare.side_bytes) == (1, 1, 0, 0)
    assert bare.models == {"old": Held(native_items=1, lineages={(): 1}, bytes=bare.models["old"].bytes)}
    assert found[ids["empty"]] == Holding()


def test_to_say_what_a_gallery_holds_reads_no_items(world: World) -> None:
    def told() -> tuple[Holding, int]:
        with world.store.catalog.reading() as session:
            gallery = gallery_row(session, GALLERY).id
            return steps_of(world.store.catalog, lambda: holdings(session, [gallery])[gallery])

    world.upsert("old", [f"i{row}" for row in range(2000)], np.ones((2000, OLD)))
    whole, before = told()
    world.delete(*(f"i{row}" for row in range(900)))
    less, after = told()
    assert (whole.items, less.items, less.models["old"].native_items) == (2000, 1100, 1100)
    assert before == after
