"""`during`: searches while the same cores upgrade the gallery, against the same searches before it.

Requests come at a steady pace, as users do, and are asked in the old model, whose columns stay where they are: whatever is
slower is slower because of the upgrade.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from benchmarks import load, ours
from benchmarks.setting import Setting
from benchmarks.table import Line, Pair, at_most, compared, counted
from benchmarks.vectors import QUERIES, described

GALLERY = "photos"
SEGMENTS = 8
RATE, CONNECTIONS = 200.0, 8
IDLE_SECONDS = 20.0
ROUNDS = 3


def measure(setting: Setting) -> Iterator[Line]:
    """Idle, then an upgrade from beginning to end, then its rollback, and again."""
    items, sides = described(setting.items + QUERIES)
    queries, items, sides = items[:QUERIES], items[QUERIES:], sides[QUERIES:]
    with setting.folder() as folder, ours.running(folder / "ours", ours.AS_WRITTEN) as us:
        ours.register(us.client, ours.write_artifact(folder / "forward.safetensors"))
        ours.fill(us.client, GALLERY, items, sides, segments=SEGMENTS)
        ours.wait_indexed(us.client, GALLERY)
        requests = ours.searches(GALLERY, queries)
        load.one_by_one(us.server.port, requests, len(requests)).checked()
        idle, busy = [], []
        for _ in range(min(ROUNDS, setting.rounds)):
            idle.append(_paced(us, requests, lambda at: at < setting.seconds(IDLE_SECONDS)))
            with _Upgrade(us) as upgrade:
                busy.append(_paced(us, requests, upgrade.runs))
        note = (
            f"{RATE:.0f} searches/s over {CONNECTIONS} connections, {len(items):,} items; upgrades took "
            f"{min(each.seconds for each in busy):.0f} to {max(each.seconds for each in busy):.0f} s"
        )
        for percent, bar in ((50, None), (99, at_most(2.0))):
            pairs = [
                Pair(under.percentile(percent), calm.percentile(percent))
                for calm, under in zip(idle, busy, strict=True)
            ]
            yield compared(f"while an upgrade runs, against idle, p{percent}", pairs, bar, unit="ms", note=note)
        sent = sum(len(each.answers) for each in busy)
        failed = [each.failed for each in (*idle, *busy)]
        yield counted("failed searches", failed, at_most(0), note=f"{sent:,} of them during upgrades")


def _paced(us: ours.Ours, requests: list[bytes], while_: Callable[[float], bool]) -> load.Load:
    return load.paced(us.server.port, requests, connections=CONNECTIONS, rate=RATE, while_=while_)


class _Upgrade:
    """Runs from the beginning of a `with` block, in a thread that waits for it; rolled back at its end."""

    def __init__(self, us: ours.Ours) -> None:
        self._us = us
        self._id = us.client.start_upgrade(GALLERY, transformation=ours.FORWARD)["id"]
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def runs(self, _: float) -> bool:
        return self._thread.is_alive()

    def __enter__(self) -> _Upgrade:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        self._us.client.rollback(self._id)
        self._us.client.wait(self._id, until="rolled_back")

    def _wait(self) -> None:
        try:
            self._us.client.wait(self._id)
        except Exception as error:  # noqa: BLE001 - raised where the block ends
            self._failure = error
