"""`writes`: clients that each write one item at a time, against one such client.

Commits follow each other, so what many clients gain over one is what is committed together.
"""

from __future__ import annotations

from collections.abc import Iterator

import orjson

from benchmarks import load, ours
from benchmarks.setting import Setting
from benchmarks.table import Line, Pair, at_least, compared
from forwardfill.wire import encoded
from gallery.arrays import Vectors

#: by the number of connections, what they should write for each item that one does
_BARS = {8: 2.0, 32: 4.0}


def measure(setting: Setting) -> Iterator[Line]:
    """Rates into galleries that begin empty, as each write makes what a search has to look at."""
    rates: dict[int, list[Pair]] = {connections: [] for connections in _BARS}
    with setting.folder() as folder, ours.running(folder / "ours", worker=False) as us:
        ours.register(us.client)
        for turn in range(setting.rounds):
            for connections, pairs in rates.items():
                pair = (_rate(us, f"{side}-{connections}-{turn}", side, setting) for side in (connections, 1))
                pairs.append(Pair(*pair))
    for connections, pairs in rates.items():
        what = f"items per second, one in each request, {connections} connections against one"
        yield compared(what, pairs, at_least(_BARS[connections]), unit="/s", note=setting.data.name)


def _rate(us: ours.Ours, gallery: str, connections: int, setting: Setting) -> float:
    count = setting.requests(40 * connections + 160)
    us.client.create_gallery(gallery, ours.OLD)
    requests = _upserts(gallery, setting.data.items[:count])
    done = load.together(us.server.port, requests, connections=connections, count=len(requests)).checked()
    us.client.delete_gallery(gallery)  # else each of its segments would stay open
    return done.rate


def _upserts(gallery: str, items: Vectors) -> list[bytes]:
    """A request for each item."""
    bodies = (
        {"model": ours.OLD, "items": [{"id": str(at), "embedding": encoded(item)}]} for at, item in enumerate(items)
    )
    return [load.post(f"/galleries/{gallery}/items", orjson.dumps(body)) for body in bodies]
