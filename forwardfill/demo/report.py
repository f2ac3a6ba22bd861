"""What the demo leaves: a table for people, a picture, and `report.json` for programs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from forwardfill.answers import Upgrade
from forwardfill.demo import chart
from forwardfill.demo.quality import SHORT, Quality
from forwardfill.demo.story import SEGMENTS, Story
from forwardfill.demo.traffic import Record
from models.evaluation import fraction_closed

Json = dict[str, Any]


def tell(console: Console, story: Story, out: Path, *, title: str, seconds: float) -> int:
    """Write `report.json` and the picture, print the table, and judge: 0 if every search was answered rightly."""
    report = make(story)
    (out / "report.json").write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    start = _moment(story.upgrade["created_at"]).timestamp()
    shown = [
        chart.Search(
            each.at - start, each.model == story.upgrade["target_model"], 1000 * each.seconds, bool(each.failure)
        )
        for each in story.searches
    ]
    picture = out / "quality.png"
    chart.draw(picture, title=title, quality=report["quality"], searches=shown, seconds=report["upgrade"]["seconds"])
    _print(console, report, title)
    console.print(f"{out / 'report.json'}, {picture}; all of it took {seconds:.0f} s", highlight=False)
    return _verdict(console, report, story.searches)


def make(story: Story) -> Json:
    """The report; its keys are those of the contract, and some more."""
    items = len(story.items.ids)
    measured = {name: _shares(each.quality) for name, each in story.measured.items()}
    by_progress = [{"fraction": round(each.fraction, 6), **_shares(each.quality)} for each in story.by_progress]
    during = [each for each in story.searches if _is_during(each, story.upgrade)]
    encoder, requests = story.reembedding
    return {
        "items": items,
        "searches": {
            "total": len(story.searches),
            "failed": sum(each.failure is not None for each in story.searches),
            "during_upgrade": len(during),
        },
        "quality": {**measured, "by_progress": by_progress},
        "closed": {name: _closed(measured, name) for name in Quality._fields},
        "upgrade": _speed(items, seconds_of(story.upgrade)),
        "upgrade_unthrottled": _speed(items, seconds_of(story.unthrottled)),
        "reembed": {**_speed(items, encoder + requests), "encoder_seconds": round(encoder, 3)},
        "rollback": {"searches": story.undone[0], "same": story.undone[1]},
        "notes": _protocol(story),
    }


def seconds_of(upgrade: Upgrade) -> float:
    """From the request to the end, by the service's clock."""
    return (_moment(upgrade["finished_at"]) - _moment(upgrade["created_at"])).total_seconds()


def _moment(text: str | None) -> datetime:
    return datetime.fromisoformat(text or "")


def _is_during(search: Record, upgrade: Upgrade) -> bool:
    """Sent after the upgrade was accepted, and answered before it was completed."""
    start, end = _moment(upgrade["created_at"]).timestamp(), _moment(upgrade["finished_at"]).timestamp()
    return start <= search.at and search.at + search.seconds <= end


def _shares(quality: Quality) -> Json:
    return {name: round(value, 6) for name, value in quality._asdict().items()}


def _speed(items: int, seconds: float) -> Json:
    return {"seconds": round(seconds, 3), "items_per_second": round(items / max(seconds, 1e-9), 1)}


def _closed(measured: Json, name: str) -> float | None:
    before, after, best = (measured[key][name] for key in ("old_old", "new_upgraded", "new_new"))
    return None if best == before else round(fraction_closed(before, after, best), 6)


def _protocol(story: Story) -> list[str]:
    """How it was measured."""
    items, scale = len(story.items.ids), story.scale
    short, whole = (min(items, count or items) for count in (scale.short_queries, scale.whole_queries))
    old, new = story.items.old.shape[1], story.items.new.shape[1]
    swap = "" if old == new else f", {'cut' if new > old else 'padded with zeros'} from {new} to {old} dimensions"
    pauses = f"was paused for {story.pauses} of them" if story.pauses else "went on meanwhile"
    return [
        "Queries are the items themselves; each one's own item is left out of its answer. Relevant is the same label.",
        f"CMC-1: {short} searches for {SHORT - 1} hits and the own item, as a user searches: by the `forward` route "
        "the service looks at its default number of candidates.",
        f"mAP: {whole} searches, the same ones each time, for all {items} items.",
        "new/old naive: vectors of the new model, sent as if they were the old model's" + swap + ".",
        f"Each line is of one gallery version; its fraction is what `served.routes` said. The upgrade {pauses}. The "
        f"{SEGMENTS} segments hold the test split in random order.",
        "upgrade: as it was watched, throttled so that its middle can be seen. upgrade_unthrottled: the same work after a "
        "rollback, at full speed. Both from the request to the end, by the service's clock.",
        "reembed: the new model over the same images, and writing the result in as many requests; image files would have "
        "to be fetched and decoded too. While it and upgrade_unthrottled were timed, nobody searched.",
    ]


def _print(console: Console, report: Json, title: str) -> None:
    quality = report["quality"]
    table = Table(title=title, title_justify="left")
    for name in ("query / gallery", "CMC-1 %", "mAP %"):
        table.add_column(name, justify="left" if name.startswith("query") else "right")
    rows = [("old / old", quality["old_old"]), ("new / old, naive swap", quality["new_old_naive"])]
    rows += [(f"new / {point['fraction']:.0%} upgraded", point) for point in quality["by_progress"]]
    rows += [("new / upgraded", quality["new_upgraded"]), ("new / new: full re-embedding", quality["new_new"])]
    for name, each in rows:
        table.add_row(
            name, f"{100 * each['cmc1']:.2f}", f"{100 * each['map']:.2f}", end_section=name.startswith("new / 100")
        )
    closed = ("-" if value is None else f"{100 * value:.0f}" for value in report["closed"].values())
    table.add_row("closed of the way from old/old to new/new", *closed)
    console.print(table)
    _print_work(console, report)


def _print_work(console: Console, report: Json) -> None:
    table = Table("work", "seconds", "items/s", title_justify="left")
    for name, key in (
        ("upgrade, throttled to be watched", "upgrade"),
        ("upgrade, at full speed", "upgrade_unthrottled"),
        ("re-embedding the same items", "reembed"),
    ):
        table.add_row(name, f"{report[key]['seconds']:.1f}", f"{report[key]['items_per_second']:,.0f}")
    console.print(table)
    searches, undone = report["searches"], report["rollback"]
    console.print(
        f"Searches: {searches['total']:,} sent, {searches['during_upgrade']:,} of them during the upgrade, "
        f"{searches['failed']} failed. After a rollback {undone['same']:,} of {undone['searches']:,} answers are as before.",
        highlight=False,
    )
    for note in report["notes"]:
        console.print(f"  - {note}", style="dim", highlight=False)


def _verdict(console: Console, report: Json, searches: Sequence[Record]) -> int:
    """Say what is wrong, in a sentence each."""
    wrong = []
    if report["searches"]["failed"]:
        first = next(each.failure for each in searches if each.failure is not None)
        wrong.append(f"{report['searches']['failed']} searches failed, the first with: {first}")
    if report["rollback"]["same"] != report["rollback"]["searches"]:
        wrong.append("after the rollback, some searches had other answers than before the upgrade")
    for sentence in wrong:
        console.print(sentence, style="red", markup=False, highlight=False)
    return 1 if wrong else 0
