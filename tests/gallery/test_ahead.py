"""Work done ahead: the same items, one at a time before they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing

import pytest

from gallery.ahead import ahead


def test_it_gives_the_same_items_in_the_same_order() -> None:
    assert list(ahead(number for number in range(50))) == list(range(50))
    assert list(ahead(number for number in ())) == []


def test_the_next_item_is_made_while_the_caller_is_busy_with_this_one() -> None:
    made = [threading.Event() for _ in range(3)]

    def items() -> Generator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    for number in ahead(items()):
        assert all(event.wait(20) for event in made[: number + 2])


def test_no_more_than_one_item_is_made_before_it_is_asked_for_and_who_stops_closes_the_rest() -> None:
    made, closed = [], threading.Event()

    def items() -> Generator[int]:
        try:
            for number in range(9):
                made.append(number)
                yield number
        finally:
            closed.set()

    with closing(ahead(items())) as found:
        assert [next(found), next(found)] == [0, 1]
    assert made == [0, 1, 2]
    assert closed.is_set()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")] == []


def test_what_goes_wrong_is_raised_in_its_place() -> None:
    def items() -> Generator[int]:
        yield 1
        yield 2
        raise OSError("the disk is gone")

    found = ahead(items())
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)
    assert list(found) == []
