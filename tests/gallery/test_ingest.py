"""Which models a gallery takes items of, beside what `test_upgrade_machine.py` tries."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event

from gallery import errors, ingest, removal
from gallery.files import PART
from gallery.upgrade import lifecycle
from gallery.upgrade.states import State
from tests.gallery.world import Linear, World, found

ONE, SIDE = np.ones((1, 4)), np.ones((1, 2))


def test_items_of_a_third_model_do_not_stop_an_upgrade_for_ever(world: World) -> None:
    world.register("third", 2)
    world.transformation("bct", "third", "old", Linear([[1, 0, 0, 0], [0, 1, 0, 0]]))
    world.upsert("old", ["a"], ONE, side=SIDE)
    upgrade = world.start()
    with pytest.raises(errors.NoRoute, match="old to new"):
        world.upsert("third", ["b"], np.ones((1, 2)))
    assert world.run(upgrade) is State.COMPLETED, world.error(upgrade)


def test_a_write_reads_the_registry_only_for_a_model_that_is_none_of_the_gallerys(each_world: World) -> None:
    each_world.register("third", 2)
    each_world.transformation("bct", "third", "old", Linear([[1, 0, 0, 0], [0, 1, 0, 0]]))
    asked: list[str] = []
    event.listen(each_world.store.catalog.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))

    def read(model: str, vectors: Any, **more: Any) -> int:
        """How often a write reads all models or all transformations."""
        asked.clear()
        each_world.upsert(model, ["a"], vectors, **more)
        return len([each for each in asked if re.search(r"FROM (models\s+ORDER|transformations)\b", each)])

    assert read("third", np.ones((1, 2))) == 4, "both, once more under the gallery's lock"
    assert read("old", ONE, side=SIDE) == 0
    each_world.start()
    assert read("old", ONE, side=SIDE) == 0


def test_a_write_syncs_each_of_its_files_and_their_folder_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = Counter[str](), os.fsync

    def counted(handle: int) -> None:
        synced[Path(f"/proc/self/fd/{handle}").readlink().name] += 1
        sync(handle)

    monkeypatch.setattr(os, "fsync", counted)
    world.upsert("old", ["b", "c"], np.ones((2, 4)), side=SIDE, has_side=[True, False])
    (written,) = (world.store.files.root / "columns").iterdir()
    names = [file.name for file in written.iterdir()]
    assert len(names) == 3 + 2, "ids and embeddings of two segments, and side-information of one"
    assert synced == Counter([written.name, *(name + PART for name in names)])


def test_a_request_with_one_bad_item_changes_nothing(each_world: World) -> None:
    each_world.upsert("old", ["a"], ONE, side=SIDE)
    version = each_world.version()
    vectors = np.ones((3, 4))
    vectors[2, 0] = np.nan
    with pytest.raises(errors.InvalidVector) as refused:
        each_world.upsert("old", ["a", "b", "c"], vectors)
    assert refused.value.pointer == "/items/2/embedding"
    with pytest.raises(errors.DuplicateId):
        each_world.upsert("old", ["b", "b"], np.ones((2, 4)))
    assert each_world.version() == version
    assert found(each_world.search("old", ONE)) == {"a": 0.0}


def test_writes_that_race_with_every_step_of_an_upgrade_are_all_found_in_both_models(
    each_world: World, tmp_path: Path
) -> None:
    each_world.upsert("old", ["first"], ONE, side=SIDE)
    written, done = {"first"}, threading.Event()
    other = World.open(tmp_path / "data", each_world.store.settings.database_url)

    def write() -> None:
        for at in range(12):
            other.upsert("old", [f"i{at}"], ONE * at, side=SIDE)
            written.add(f"i{at}")
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        upgrade = each_world.start()
        while (not done.is_set() and not writing.done()) or each_world.state(upgrade) is not State.COMPLETED:
            each_world.step(upgrade)
        writing.result()
    assert found(each_world.search("old", ONE)).keys() == written
    answer = each_world.search("new", np.ones((1, 5)))
    assert found(answer).keys() == written
    assert answer.coverage.direct == len(written)
    lifecycle.finalize(each_world.store, upgrade)
    assert found(each_world.search("new", np.ones((1, 5)))).keys() == written
    other.close()


def test_a_gallery_that_is_deleted_and_made_again_is_empty_for_a_process_that_did_not_look(
    each_world: World, tmp_path: Path
) -> None:
    other = World.open(tmp_path / "data", each_world.store.settings.database_url)
    each_world.upsert("old", ["a"], ONE, side=SIDE)
    assert found(other.search("old", ONE)).keys() == {"a"}
    removal.delete_gallery(each_world.store, "photos")
    each_world.make("photos")
    each_world.upsert("old", ["b"], ONE, side=SIDE)
    assert found(other.search("old", ONE)).keys() == {"b"}
    other.close()


def test_a_write_that_began_before_a_refused_upgrade_was_resumed_does_not_make_it_fail(
    each_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, write = each_world, ingest._write
    world.upsert("old", ["a"], ONE, side=SIDE)
    world.upsert("old", ["bare"], ONE)
    upgrade = world.start()
    assert world.run(upgrade) is State.FAILED
    world.delete("bare")

    def meanwhile(*given: Any) -> Any:
        monkeypatch.undo()
        lifecycle.resume(world.store, upgrade)
        world.step(upgrade)
        return write(*given)

    monkeypatch.setattr(ingest, "_write", meanwhile)
    with pytest.raises(errors.MissingSideInformation):
        world.upsert("old", ["late"], ONE)
    assert world.run(upgrade) is State.COMPLETED, world.error(upgrade)
