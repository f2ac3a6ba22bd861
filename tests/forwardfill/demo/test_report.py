"""The report of a story: its keys, its sums, its verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from rich.console import Console

from forwardfill.demo import report
from forwardfill.demo.quality import Measurement, Quality
from forwardfill.demo.story import Items, Scale, Story
from forwardfill.demo.traffic import Record

START = 1_795_000_000.0  # 2026-11-18T11:06:40Z


def upgrade(seconds: int) -> Any:
    finished = f"2026-11-18T11:06:{40 + seconds}.000000Z"
    return {"created_at": "2026-11-18T11:06:40.000000Z", "finished_at": finished, "target_model": "new"}


def measured(cmc1: float, fraction: float = 0.0) -> Measurement:
    return Measurement(Quality(cmc1, cmc1 / 2), fraction, 1, 0.1)


@pytest.fixture
def story() -> Story:
    count = 40
    items = Items(
        ids=tuple(f"i{at}" for at in range(count)),
        labels=np.zeros(count, np.int64),
        images=np.zeros((count, 1, 8, 8), np.float32),
        old=np.ones((count, 4), np.float32),
        side=np.ones((count, 2), np.float32),
        new=np.arange(count * 6, dtype=np.float32).reshape(count, 6),
    )
    told = Story(items, Scale(whole_queries=10))
    told.measured = {"old_old": measured(0.5), "new_old_naive": measured(0.1), "new_new": measured(0.9)}
    told.by_progress = [measured(0.8, 0.0), measured(0.82, 0.5), measured(0.85, 1.0)]
    told.measured["new_upgraded"] = told.by_progress[-1]
    told.upgrade, told.unthrottled = upgrade(10), upgrade(2)
    told.searches = [Record(START + at, "new" if at % 2 else "old", 0.5, None) for at in range(-3, 13)]
    told.reembedding = (3.0, 1.0)
    told.undone = (40, 40)
    return told


def test_the_report_has_the_keys_of_the_contract(story: Story) -> None:
    made = report.make(story)
    assert made["items"] == 40
    assert set(made["searches"]) == {"total", "failed", "during_upgrade"}
    assert set(made["quality"]) == {"old_old", "new_old_naive", "by_progress", "new_upgraded", "new_new"}
    assert all(set(point) == {"fraction", "cmc1", "map"} for point in made["quality"]["by_progress"])
    assert made["quality"]["old_old"] == {"cmc1": 0.5, "map": 0.25}
    assert {"seconds", "items_per_second"} <= set(made["upgrade"]) & set(made["reembed"])


def test_a_search_counts_as_during_the_upgrade_if_it_began_and_ended_within_it(story: Story) -> None:
    # Sent at -3 ... 12 s, each half a second long; the upgrade lasts from 0 to 10.
    assert report.make(story)["searches"] == {"total": 16, "failed": 0, "during_upgrade": 10}


def test_speeds_and_the_closed_distance_are_computed(story: Story) -> None:
    made = report.make(story)
    assert made["upgrade"] == {"seconds": 10.0, "items_per_second": 4.0}
    assert made["upgrade_unthrottled"] == {"seconds": 2.0, "items_per_second": 20.0}
    assert made["reembed"] == {"seconds": 4.0, "items_per_second": 10.0, "encoder_seconds": 3.0}
    assert made["closed"] == {"cmc1": pytest.approx(0.875), "map": pytest.approx(0.875)}


def test_a_distance_of_nothing_has_no_closed_part(story: Story) -> None:
    story.measured["new_new"] = story.measured["old_old"]
    assert report.make(story)["closed"] == {"cmc1": None, "map": None}


def test_the_notes_say_that_the_naive_swap_was_cut(story: Story) -> None:
    assert any("cut from 6 to 4 dimensions" in note for note in report.make(story)["notes"])
    assert story.items.naive_queries.vectors.tolist() == story.items.new[:, :4].tolist()


def test_a_good_story_ends_well_and_leaves_report_and_picture(story: Story, tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    assert report.tell(console, story, tmp_path, title="digits", seconds=99.0) == 0
    assert orjson.loads((tmp_path / "report.json").read_bytes()) == orjson.loads(orjson.dumps(report.make(story)))
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    said = console.export_text()
    assert "new / 50% upgraded" in said
    assert "16 sent, 10 of them during the upgrade, 0 failed" in said


def test_one_failed_search_ends_it_badly_and_says_why(story: Story, tmp_path: Path) -> None:
    story.searches[3] = story.searches[3]._replace(failure="2 hits, not 3")
    console = Console(record=True, width=120)
    assert report.tell(console, story, tmp_path, title="digits", seconds=99.0) == 1
    assert "1 searches failed, the first with: 2 hits, not 3" in console.export_text()


def test_an_answer_that_differs_after_the_rollback_ends_it_badly(story: Story, tmp_path: Path) -> None:
    story.undone = (40, 39)
    assert report.tell(Console(record=True), story, tmp_path, title="digits", seconds=99.0) == 1
