"""A part of the matrix that takes seconds; `make faults` plays all of it, on both stacks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from gallery.faults import POINTS
from tests.acceptance.forks import Nursery
from tests.faults.cases import cases
from tests.faults.delays import worker_freezes, writer_freezes_and_its_files_are_collected
from tests.faults.ground import derived_column_is_damaged, two_start_at_once
from tests.faults.kills import crowded_api_dies, worker_dies, writing_api_dies
from tests.faults.stage import Play, Stage, staged

PART: dict[str, Play] = {
    "the worker is killed as it publishes": partial(worker_dies, point="publish:kill:2"),
    "an API process is killed after the commit of an upsert": partial(
        writing_api_dies, point="upsert.committed:kill:1"
    ),
    "an API process is killed in the midst of upserts of many clients": partial(
        crowded_api_dies, point="upsert:kill:3"
    ),
    "a worker is frozen past its lease": partial(worker_freezes, point="read:stop:1"),
    "two start an upgrade at once": two_start_at_once,
    "a derived column is damaged before all is done": derived_column_is_damaged,
    "an API process is frozen and its files are collected": partial(
        writer_freezes_and_its_files_are_collected, point="written:stop:1"
    ),
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Nursery() as nursery, staged(tmp_path_factory.mktemp("stage"), nursery.spawn) as found:
        yield found


@pytest.mark.acceptance
@pytest.mark.parametrize("play", PART.values(), ids=PART.keys())
def test_nothing_is_lost_doubled_or_wrong_when(play: Play, stage: Stage) -> None:
    run = stage.begin()
    judged = play(stage, run)
    assert judged.clean, judged
    assert len(run.book.answers) > 3
    run.end()


def test_the_matrix_dies_at_every_point() -> None:
    killed = {case.play.keywords["point"].split(":")[0] for case in cases() if case.fault == "kill -9"}
    assert killed == POINTS
