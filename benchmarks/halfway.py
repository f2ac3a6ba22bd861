"""`half`: a half-upgraded gallery against the same one fully upgraded, for queries of the new model.

Half of the items are still in the old space, so each search transforms its candidates. That forward pass is the method's
price, and not ours: it is measured bare, right beside the search, and taken off. What is left is ours, with every
candidate transformed anew; and then with the candidates of queries that were asked before, of which none is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from benchmarks import load, ours
from benchmarks.setting import Setting
from benchmarks.table import Line, Pair, at_most, compared
from benchmarks.vectors import described
from forwardfill.answers import Throttle
from forwardfill.client import Client
from gallery.settings import GallerySettings

SEGMENTS = 8
HALF, FULL = "half", "full"
BAR = at_most(2.0)

_LOOK_SECONDS = 0.02


def measure(setting: Setting) -> Iterator[Line]:
    """Two services over one folder: one that keeps no mapped candidate, and one with the usual cache."""
    count = setting.requests(200)
    items, sides = described(setting.items + count)
    asked, asked_sides, items, sides = items[:count], sides[:count], items[count:], sides[count:]
    with setting.folder() as folder:
        artifact = ours.write_artifact(folder / "forward.safetensors")
        candidates = GallerySettings().min_candidates
        sample = items[:candidates], sides[:candidates]
        transform = ours.bare(artifact, sample)
        queries = transform(asked, asked_sides)
        with ours.running(folder / "ours", {**ours.AS_WRITTEN, "mapped_cache_bytes": 0}) as us:
            ours.register(us.client, artifact)
            for gallery in (FULL, HALF):
                ours.fill(us.client, gallery, items, sides, segments=SEGMENTS)
                ours.wait_indexed(us.client, gallery)
            ours.upgrade(us.client, FULL)
            share = _upgrade_half(us.client, len(items), setting.seconds(5.0))
            half, full = (ours.searches(gallery, queries, model=ours.NEW, companions=asked) for gallery in (HALF, FULL))
            rounds = [_round(us.server.port, half, full, lambda: transform(*sample)) for _ in range(setting.rounds)]
            note = (
                f"{len(items):,} items with side-information, {share:.0%} upgraded; of the search, p50 {_ms(rounds, 0)}, the "
                f"bare pass of its {candidates} candidates takes {_ms(rounds, 1)} in {transform.computed_in}"
            )
            pairs = [Pair((mixed - bare) * 1000, whole * 1000) for mixed, bare, whole in rounds]
            yield compared("half against fully upgraded, p50 beyond the pass", pairs, BAR, unit="ms", note=note)
            yield compared(
                "half against fully upgraded, candidates cached", _cached(setting, folder, half, full), BAR, unit="ms"
            )


def _upgrade_half(client: Client, items: int, seconds: float) -> float:
    """Upgrade until half of the segments are done, and pause; the share that is done.

    It is throttled to a segment in `seconds`, so that there is time to stop it between two.
    """
    throttle: Throttle = {"items_per_second": items / SEGMENTS / seconds}
    upgrade = client.start_upgrade(HALF, transformation=ours.FORWARD, throttle=throttle)["id"]
    while client.upgrade(upgrade)["progress"]["segments_done"] < SEGMENTS // 2:
        time.sleep(_LOOK_SECONDS)
    client.pause(upgrade)
    time.sleep(seconds)  # a segment that was under way all the same is published by then
    progress = client.upgrade(upgrade)["progress"]
    if not 0.4 <= progress["fraction"] <= 0.8:
        raise RuntimeError(f"not half of it is upgraded: {progress}")
    return progress["fraction"]


def _round(
    port: int, half: list[bytes], full: list[bytes], bare_pass: Callable[[], object]
) -> tuple[float, float, float]:
    """Median seconds of a half-upgraded search, of the bare pass, and of a fully upgraded search, asked in turn."""
    connection = load.Connection(port)
    halves, passes, fulls = [], [], []
    for to_half, to_full in zip(half, full, strict=True):
        halves.append(load.Load(0.0, [connection.ask(to_half)]).checked().answers[0].seconds)
        started = time.perf_counter()
        bare_pass()
        passes.append(time.perf_counter() - started)
        fulls.append(load.Load(0.0, [connection.ask(to_full)]).checked().answers[0].seconds)
    connection.close()
    return median(halves), median(passes), median(fulls)


def _cached(setting: Setting, folder: Path, half: list[bytes], full: list[bytes]) -> list[Pair]:
    """The same on a service that keeps what it transformed, once every query was asked."""
    count = setting.requests(1000)
    with ours.running(folder / "ours", worker=False) as us:
        for warm in (half, full):
            load.one_by_one(us.server.port, warm, len(warm)).checked()
        return [
            Pair(*(load.one_by_one(us.server.port, each, count).checked().percentile(50) for each in (half, full)))
            for _ in range(setting.rounds)
        ]


def _ms(rounds: list[tuple[float, float, float]], part: int) -> str:
    return f"{median(each[part] for each in rounds) * 1000:.2f} ms"
