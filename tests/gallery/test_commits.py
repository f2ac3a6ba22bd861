"""Processes behind one port: what one of them told a client, the others know before they answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gallery.commits import Commits
from gallery.snapshot import Galleries
from tests.gallery.world import GALLERY, OLD, World


@pytest.fixture
def commits(tmp_path: Path) -> list[Commits]:
    Commits.make(tmp_path / "commits", 3)
    return [Commits(tmp_path / "commits", place) for place in range(3)]


def test_an_announcement_is_seen_by_the_others_only(commits: list[Commits]) -> None:
    before = [each.of_others() for each in commits]
    commits[1].announce()
    after = [each.of_others() for each in commits]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, False]


def test_each_announcement_differs_from_all_before(commits: list[Commits]) -> None:
    seen = {commits[0].of_others()}
    for turn in range(600):  # beyond one byte
        commits[1 + turn % 2].announce()
        seen.add(commits[0].of_others())
    assert len(seen) == 601


def test_one_that_is_started_again_goes_on_counting(commits: list[Commits], tmp_path: Path) -> None:
    commits[0].announce()
    before = commits[1].of_others()
    Commits(tmp_path / "commits", 0).announce()
    assert commits[1].of_others() != before


class Two:
    """The galleries of two processes."""

    def __init__(self, world: World, commits: list[Commits]) -> None:
        self.world = world
        self.one, self.other = (Galleries(world.store.catalog, world.store.files, commits=each) for each in commits[:2])
        self.one.refresh()
        self.other.refresh()

    def write(self, item: str) -> None:
        self.world.upsert("old", [item], np.ones((1, OLD), np.float32))


@pytest.fixture
def two(tmp_path: Path, commits: list[Commits]) -> Two:
    return Two(World.open(tmp_path / "world").prepare(), commits)


def test_the_other_is_behind_until_it_has_read_what_was_announced(two: Two) -> None:
    two.write("a")
    two.one.announced()
    assert two.other.behind is not None
    assert two.one.behind is None
    assert two.other.refresh().snapshot(GALLERY).live == 1
    assert two.other.behind is None


def test_what_nobody_was_told_of_makes_nobody_wait(two: Two) -> None:
    two.write("a")
    two.one.refresh()
    assert two.other.behind is None


def test_what_was_read_before_anyone_was_told_is_announced_all_the_same(two: Two) -> None:
    two.write("a")
    two.one.refresh()  # as the thread does that watches
    two.one.announced()
    assert two.other.behind is not None


def test_where_nothing_is_new_nothing_is_announced(two: Two) -> None:
    two.one.announced()
    two.other.refresh()
    two.one.announced()
    assert two.other.behind is None


def test_what_is_forgone_is_not_waited_for_but_what_comes_after_it_is(two: Two) -> None:
    two.write("a")
    two.one.announced()
    behind = two.other.behind
    assert behind is not None
    two.other.forgo(behind)
    assert two.other.behind is None
    two.write("b")
    two.one.announced()
    assert two.other.behind is not None


def test_alone_nobody_is_ever_behind(tmp_path: Path) -> None:
    world = World.open(tmp_path).prepare()
    world.upsert("old", ["a"], np.ones((1, OLD), np.float32))
    assert world.galleries.announced().snapshot(GALLERY).live == 1
    assert world.galleries.behind is None
