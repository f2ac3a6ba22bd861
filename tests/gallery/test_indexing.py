"""A column gets the index that finds enough, or none and the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gallery import indexing
from gallery.catalog.holdings import held
from gallery.catalog.segments import MEASURED, REFUSED
from gallery.catalog.tables import ColumnRow
from gallery.index import _ivf, _reach, choose
from gallery.index.base import JOINED, REACH
from gallery.indexing import index_column, wanting
from gallery.upgrade.states import State
from tests.gallery.world import OLD, World


def filled(world: World, rows: int = 300) -> int:
    """Write one segment of whole numbers; the id of its column."""
    vectors = np.random.default_rng(0).integers(-50, 50, (rows, OLD))
    world.store.settings.exact_below = 100
    world.upsert("old", [f"i{row}" for row in range(rows)], vectors)
    (column,) = wanting(world.store)
    return column


def row(world: World, column: int) -> ColumnRow:
    with world.store.catalog.reading() as session:
        return session.get_one(ColumnRow, column)


def told(world: World) -> list[Any]:
    with world.store.catalog.reading() as session:
        return list(held(session, [1])[1]["old"].measured)


def test_the_recall_of_an_index_is_recorded_beside_the_parameters_that_reach_it(each_world: World) -> None:
    column = filled(each_world)
    assert index_column(each_world.store, column)
    made = row(each_world, column)
    assert (made.index_kind, made.index_parameters["nprobe"]) == ("ivf_pq", 8)
    assert made.index_parameters[MEASURED] >= choose.RECALL
    assert told(each_world) == [{"segment": made.segment_id, "rows": 300, "kind": "ivf_pq", **made.index_parameters}]
    assert not wanting(each_world.store)


def test_index_settings_that_name_no_kind_are_those_of_auto(each_world: World) -> None:
    each_world.make("unsaid", index={})
    each_world.store.settings.exact_below = 100
    vectors = np.random.default_rng(0).standard_normal((300, OLD))
    each_world.upsert("old", [f"i{row}" for row in range(len(vectors))], vectors, gallery="unsaid")
    (column,) = wanting(each_world.store)
    assert index_column(each_world.store, column)
    assert row(each_world, column).index_kind == "ivf_pq"


def test_fewer_lists_are_recorded_for_where_it_is_a_small_part_of_what_is_searched_together(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ivf, "_FIRST_PROBES", 1)  # four dimensions need no more than a few lists
    world.store.settings.exact_below = 100
    vectors = np.random.default_rng(0).standard_normal((4000, OLD))
    world.upsert("old", [f"i{row}" for row in range(len(vectors))], vectors)
    (column,) = wanting(world.store)
    assert index_column(world.store, column)
    made = row(world, column).index_parameters
    assert made[JOINED]["nprobe"] < made["nprobe"]


def test_a_shelf_of_rows_in_pairs_that_are_almost_alike_finds_what_lies_beyond_the_pair(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest row of each is its twin, in the same list: to find that one says nothing of the others."""
    monkeypatch.setattr(_ivf, "_FIRST_PROBES", 1)
    world.store.settings.exact_below = 100
    world.register("wide", 12)
    world.make("pairs", model="wide")
    rng, segments, rows = np.random.default_rng(0), 10, 1000
    vectors = np.repeat(rng.standard_normal((segments * rows // 2, 12)), 2, axis=0)
    vectors = (vectors + 0.001 * rng.standard_normal(vectors.shape)).astype(np.float32)
    for at in range(0, len(vectors), rows):
        ids = [str(row) for row in range(at, at + rows)]
        world.upsert("wide", ids, vectors[at : at + rows], gallery="pairs")
    for column in wanting(world.store):
        assert index_column(world.store, column)
    queries = rng.standard_normal((100, 12)).astype(np.float32)
    answer = world.search("wide", queries, k=10, gallery="pairs")
    assert len(answer.snapshot.shelves) == 1
    found = [{int(hit.id) for hit in answer.hits(query)} for query in range(len(queries))]
    nearest = np.argsort(((queries[:, None] - vectors) ** 2).sum(axis=2), axis=1)[:, :10].tolist()
    assert sum(len(one & set(rows)) for one, rows in zip(found, nearest, strict=True)) >= 0.98 * 10 * len(queries)


def test_lists_that_cannot_hold_enough_are_not_searched_and_the_rest_is_measured_as_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ivf, "_FIRST_PROBES", 1)
    world.store.settings.exact_below = 100
    vectors = np.random.default_rng(0).standard_normal((4000, OLD))
    world.upsert("old", [f"i{row}" for row in range(len(vectors))], vectors)
    (column,) = wanting(world.store)
    searched, measure = list[int](), indexing.recall

    def counted(*given: Any) -> Any:
        searched.append(1)
        return measure(*given)

    monkeypatch.setattr(indexing, "recall", counted)
    assert index_column(world.store, column)
    few, made = len(searched), row(world, column).index_parameters
    with world.store.catalog.transaction() as tx:
        tx.session.get_one(ColumnRow, column).index_file = None
    monkeypatch.setattr(indexing, "held", lambda *_: 1.0)
    assert index_column(world.store, column)
    assert row(world, column).index_parameters == made
    assert few < len(searched) - few


def test_where_nothing_finds_enough_the_column_is_searched_exactly_and_says_why(
    each_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "RECALL", 1.01)  # more than there is
    column, version = filled(each_world), each_world.version()
    assert index_column(each_world.store, column)
    made = row(each_world, column)
    assert (made.index_kind, made.index_file, made.index_parameters[MEASURED]) == ("flat", None, 1.0)
    assert set(made.index_parameters[REFUSED]) == set(choose.TRIED)
    assert told(each_world)[0]["kind"] == "flat"
    # It was decided, so no worker does it again, no search has to look, and nothing of the attempts is left.
    assert not wanting(each_world.store)
    assert each_world.version() == version
    assert not [path for path in each_world.store.files.path("indexes").rglob("*") if path.is_file()]
    assert each_world.search("old", [[1, 2, 3, 4]], k=3).rows.shape == (1, 3)


def test_what_an_upgrade_or_a_merge_found_to_need_exact_search_is_not_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "RECALL", 1.01)  # more than there is
    for at in range(2):
        column = filled(world) if at == 0 else filled_more(world)
        assert index_column(world.store, column)
    assert world.run(world.start(on_missing_side_information="zeros")) is State.COMPLETED
    assert not wanting(world.store)
    world.compact()
    assert not wanting(world.store)


def filled_more(world: World) -> int:
    """Another segment; the id of its column."""
    world.upsert("old", [f"more{row}" for row in range(300)], np.random.default_rng(1).integers(-50, 50, (300, OLD)))
    (column,) = wanting(world.store)
    return column


def test_the_next_backend_is_tried_where_one_finds_too_little(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    column = filled(world, rows=2000)
    for name in ("ivf_pq", "ivf"):
        hasty = choose.backend(name).check({"nlist": 100, "nprobe": 1})
        monkeypatch.setattr(choose.backend(name), "efforts", lambda *_, hasty=hasty: [hasty], raising=False)
    assert index_column(world.store, column)
    made = row(world, column)
    assert made.index_kind == "hnsw"
    assert made.index_parameters[MEASURED] >= choose.RECALL


def test_an_index_that_was_asked_for_by_name_is_measured_and_kept(world: World) -> None:
    world.make("hasty", index={"kind": "ivf", "nlist": 100, "nprobe": 1})
    world.store.settings.exact_below = 100
    vectors = np.random.default_rng(0).standard_normal((2000, OLD))
    world.upsert("old", [f"i{at}" for at in range(2000)], vectors, gallery="hasty")
    (column,) = wanting(world.store)
    assert index_column(world.store, column)
    assert 0.1 < row(world, column).index_parameters[MEASURED] < choose.RECALL


def test_a_segment_of_one_row_has_an_index_where_that_is_asked_for(world: World) -> None:
    world.store.settings.exact_below = 0
    world.upsert("old", ["a"], np.ones((1, OLD)))
    (column,) = wanting(world.store)
    assert index_column(world.store, column)
    assert row(world, column).index_file is not None


def test_columns_with_many_rows_alike_read_no_more_lists_for_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scores are equal a search may find others than the exact one named, in lists that are nearer."""
    world.store.settings.exact_below = 100
    world.upsert("old", [f"i{row}" for row in range(3000)], np.random.default_rng(0).integers(0, 3, (3000, OLD)))
    (column,) = wanting(world.store)
    assert index_column(world.store, column)
    made = row(world, column).index_parameters
    with world.store.catalog.transaction() as tx:
        tx.session.get_one(ColumnRow, column).index_file = None
    monkeypatch.setattr(indexing, "held", lambda *_: 1.0)
    assert index_column(world.store, column)
    assert row(world, column).index_parameters == made


def test_how_far_lists_may_be_stands_with_an_index_of_which_that_leaves_out_many(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ivf, "_FIRST_PROBES", 30)
    monkeypatch.setattr(_reach, "FEWEST", 1)  # four dimensions need no more than a few lists
    world.store.settings.exact_below = 100
    rng = np.random.default_rng(0)
    centres = 10 * rng.standard_normal((40, OLD))
    vectors = centres[rng.integers(40, size=4000)] + rng.standard_normal((4000, OLD))
    world.upsert("old", [f"i{row}" for row in range(len(vectors))], vectors)
    (column,) = wanting(world.store)
    assert index_column(world.store, column)
    made = row(world, column).index_parameters
    assert made["nprobe"] == 30
    assert 1 <= made[JOINED][REACH]["times"] < made[REACH]["times"]
    assert made[JOINED][REACH]["nearest"] == made[REACH]["nearest"] > 0
    assert made[MEASURED] >= choose.RECALL


def test_an_index_that_was_asked_for_by_name_reads_all_the_lists_it_was_told_to(world: World) -> None:
    world.store.settings.exact_below = 100
    world.make("named", index={"kind": "ivf_pq", "nprobe": 30})
    vectors = np.random.default_rng(0).standard_normal((1000, OLD))
    world.upsert("old", [f"i{row}" for row in range(len(vectors))], vectors, gallery="named")
    (column,) = wanting(world.store)
    assert index_column(world.store, column)
    assert REACH not in row(world, column).index_parameters
