"""The soak's oracle finds each kind of wrong answer, and calls none wrong that may be right."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.oracle import Hit, Oracle

QUERY = np.zeros(2, np.float32)


def at(distance: float) -> dict[str, np.ndarray]:
    return {"old": np.array([distance, 0], np.float32), "new": np.array([0, distance + 1], np.float32)}


@pytest.fixture
def oracle() -> Oracle:
    """`a` and `b` written from 1 to 2; `b` replaced from 10 to 12; `a` deleted from 20 to 22."""
    made = Oracle()
    made.writing(1, {"a": at(1), "b": at(2)})
    made.acknowledged(2, ["a", "b"])
    made.writing(10, {"b": at(5)})
    made.acknowledged(12, ["b"])
    made.deleting(20, ["a"])
    made.acknowledged(22, ["a"])
    return made


def wrongs(
    oracle: Oracle, hits: list[tuple[str, float]], asked: float, answered: float, space: str = "old"
) -> list[str]:
    return oracle.wrongs(space, QUERY, [Hit(*each) for each in hits], asked, answered, whole=True)


def test_a_right_answer_has_no_wrongs_in_either_space(oracle: Oracle) -> None:
    assert wrongs(oracle, [("a", 1), ("b", 2)], 3, 4) == []
    assert wrongs(oracle, [("a", 2), ("b", 3)], 3, 4, "new") == []


@pytest.mark.parametrize("hits", [[("a", 1), ("b", 2)], [("a", 1), ("b", 5)]])
def test_while_an_item_is_replaced_it_may_be_either(oracle: Oracle, hits: list[tuple[str, float]]) -> None:
    assert wrongs(oracle, hits, 9, 11) == []


def test_once_a_replacement_is_acknowledged_the_old_score_is_wrong(oracle: Oracle) -> None:
    assert wrongs(oracle, [("a", 1), ("b", 5)], 13, 14) == []
    assert "b has the score 2" in wrongs(oracle, [("a", 1), ("b", 2)], 13, 14)[0]


@pytest.mark.parametrize("hits", [[("a", 1), ("b", 5)], [("b", 5)]])
def test_while_an_item_is_deleted_it_may_be_there_or_not(oracle: Oracle, hits: list[tuple[str, float]]) -> None:
    assert wrongs(oracle, hits, 19, 21) == []


def test_a_deleted_item_that_comes_back_is_wrong(oracle: Oracle) -> None:
    assert wrongs(oracle, [("b", 5)], 23, 24) == []
    assert wrongs(oracle, [("a", 1), ("b", 5)], 23, 24) == ["a was found, and is deleted or was never written"]


def test_what_is_lost_doubled_out_of_order_or_unknown_is_wrong(oracle: Oracle) -> None:
    assert wrongs(oracle, [("a", 1)], 3, 4) == ["1 missing, such as ['b']"]
    assert "found twice: ['a']" in wrongs(oracle, [("a", 1), ("a", 1), ("b", 2)], 3, 4)
    assert wrongs(oracle, [("b", 2), ("a", 1)], 3, 4) == ["not in the order of the scores"]
    assert wrongs(oracle, [("a", 1), ("c", 1), ("b", 2)], 3, 4) == ["c was found, and is deleted or was never written"]


def test_a_score_may_be_off_by_the_stated_error_of_a_vector_and_no_more(oracle: Oracle) -> None:
    stated = Oracle({"new": 0.01}, oracle._items)
    assert wrongs(oracle, [("a", 2.015), ("b", 3)], 3, 4, "new") != []
    assert wrongs(stated, [("a", 2.015), ("b", 3)], 3, 4, "new") == []
    assert wrongs(stated, [("a", 2.03), ("b", 3)], 3, 4, "new") != []
    assert wrongs(stated, [("a", 1.015), ("b", 2)], 3, 4, "old") != [], "what is stored is not computed"


def test_of_the_few_best_nothing_is_missing_but_every_score_counts(oracle: Oracle) -> None:
    hits = [Hit("a", 1.0)]
    assert oracle.wrongs("old", QUERY, hits, 3, 4, whole=False) == []
    assert oracle.wrongs("old", QUERY, [Hit("a", 1.5)], 3, 4, whole=False) != []


def test_an_item_whose_write_is_not_acknowledged_may_be_missing_or_there() -> None:
    made = Oracle()
    made.writing(1, {"a": at(1)})
    assert wrongs(made, [], 5, 6) == []
    assert wrongs(made, [("a", 1)], 5, 6) == []


def test_what_is_forgotten_is_only_what_no_search_can_see_any_more(oracle: Oracle) -> None:
    oracle.forget(12)
    assert wrongs(oracle, [("a", 1), ("b", 2)], 11, 12) == []
    oracle.forget(13)
    assert wrongs(oracle, [("a", 1), ("b", 5)], 13, 14) == []
    assert wrongs(oracle, [("a", 1), ("b", 2)], 11, 14) != []
