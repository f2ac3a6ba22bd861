"""What is committed stays done, and what follows is done as far as it can be."""

from __future__ import annotations

import math

from sqlalchemy.exc import DataError

from gallery import errors
from gallery.catalog.galleries import gallery_row
from gallery.catalog.transaction import in_words
from tests.gallery.world import GALLERY, World


def test_what_follows_a_commit_and_fails_does_not_undo_it_nor_stop_the_rest(each_world: World) -> None:
    followed = list[str]()

    def fails() -> None:
        raise OSError(5, "Input/output error")

    with each_world.store.catalog.transaction() as tx:
        gallery_row(tx.session, GALLERY).version += 7
        tx.after += [lambda: followed.append("first"), fails, lambda: followed.append("last")]
    assert followed == ["first", "last"]
    with each_world.store.catalog.reading() as session:
        assert gallery_row(session, GALLERY).version >= 7


def test_a_write_waits_for_nobody_who_reads_and_who_reads_sees_nothing_of_it(each_world: World) -> None:
    catalog = each_world.store.catalog
    with catalog.reading() as session:
        before = gallery_row(session, GALLERY).version
        with catalog.transaction() as tx:
            gallery_row(tx.session, GALLERY).version += 7
        session.expire_all()
        assert gallery_row(session, GALLERY).version == before
    with catalog.reading() as session:
        assert gallery_row(session, GALLERY).version == before + 7


def test_in_a_file_a_commit_is_on_the_disk_before_it_is_told_and_rows_name_rows_that_are_there(world: World) -> None:
    with world.store.catalog.engine.connect() as connection:
        told = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("synchronous", "foreign_keys")]
    assert told == [2, 1]  # FULL, on


def test_numbers_that_json_has_not_are_kept_as_null(each_world: World) -> None:
    report = {"a": [1.5, math.nan, {"b": -math.inf, "c": "NaN"}], "large": 2**70}
    with each_world.store.catalog.transaction() as tx:
        gallery_row(tx.session, GALLERY).index = report
    with each_world.store.catalog.reading() as session:
        assert gallery_row(session, GALLERY).index == {"a": [1.5, None, {"b": None, "c": "NaN"}], "large": 2**70}


def test_what_went_wrong_is_told_without_the_statement_and_its_values() -> None:
    error = DataError("SELECT mine", {"value": "secret"}, ValueError("no such number\nLINE 1: SELECT mine"))
    assert in_words(error) == "DataError: no such number"
    assert in_words(ValueError("one\ntwo")) == "ValueError: one\ntwo"


def test_what_is_refused_is_told_without_the_name_of_its_class() -> None:
    assert in_words(errors.Damaged("the file is short")) == "the file is short"
