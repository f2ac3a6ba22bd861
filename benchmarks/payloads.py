"""`payloads`: searches that ask for payloads or filter on them, against the same searches that do neither.

Such a search reads rows of the catalog. Whether it reads more of them than it needs shows in a larger gallery.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from benchmarks import load, ours
from benchmarks.setting import Setting
from benchmarks.table import Bar, Line, Pair, at_most, compared
from gallery.arrays import Vectors

ALL, TENTH = "all", "tenth"
PRICES = 1000
#: as of searches without payloads, in `million`: where all rows were read, it would be ten
_TENFOLD = at_most(3.0)
_CONNECTIONS = 8
_ASKED: dict[str, dict[str, Any]] = {
    "with payloads": {"include": ["payload"]},
    "with a filter that one item in ten fits": {"filter": {"price": {"lt": PRICES // 10}}},
}


def measure(setting: Setting) -> Iterator[Line]:
    """One client's p50, with filters that were asked before; then throughput, and filters that never were."""
    items, queries = setting.data.items, setting.data.queries
    galleries = {ALL: items, TENTH: items[: len(items) // 10]}
    with setting.folder() as folder, ours.running(folder / "ours") as us:
        ours.register(us.client)
        for gallery, part in galleries.items():
            ours.fill(us.client, gallery, part, payloads=[_payload(row) for row in range(len(part))])
            ours.wait_indexed(us.client, gallery)
        plain = ours.searches(ALL, queries)
        for what, asked in _ASKED.items():
            more = ours.searches(ALL, queries, **asked)
            yield _p50(us, f"search {what}, p50", more, plain, setting)
            yield _p50(
                us,
                f"search {what}, of {len(items):,} items against a tenth, p50",
                more,
                ours.searches(TENTH, queries, **asked),
                setting,
                _TENFOLD,
            )
        yield _rate(us, ours.searches(ALL, queries, include=["payload"]), plain, setting)
        yield _new_filters(us, queries, plain, setting)


def _payload(row: int) -> str:
    """Some two hundred bytes, as a product has them."""
    told = {
        "price": row % PRICES,
        "category": f"category-{row % 50}",
        "in_stock": row % 3 > 0,
        "text": "some words " * 12,
    }
    return orjson.dumps(told).decode()


def _p50(
    us: ours.Ours, what: str, one: list[bytes], other: list[bytes], setting: Setting, bar: Bar | None = None
) -> Line:
    count = setting.requests(1000)
    for requests in (one, other):  # a filter is asked of the catalog once
        load.one_by_one(us.server.port, requests, len(requests)).checked()
    pairs = [
        Pair(*(load.one_by_one(us.server.port, each, count).checked().percentile(50) for each in (one, other)))
        for _ in range(setting.rounds)
    ]
    return compared(what, pairs, bar, unit="ms", note=setting.data.name)


def _rate(us: ours.Ours, one: list[bytes], other: list[bytes], setting: Setting) -> Line:
    count = setting.requests(3000)
    pairs = [
        Pair(
            *(
                load.together(us.server.port, each, connections=_CONNECTIONS, count=count).checked().rate
                for each in (one, other)
            )
        )
        for _ in range(setting.rounds)
    ]
    return compared(f"searches per second with payloads, {_CONNECTIONS} connections", pairs, unit="/s")


def _new_filters(us: ours.Ours, queries: Vectors, plain: list[bytes], setting: Setting) -> Line:
    """Each filter only once: the rows that fit it are looked for among all."""
    count, pairs = setting.requests(10), list[Pair]()
    for turn in range(setting.rounds):
        filters = [{"price": {"lt": PRICES // 10, "ne": turn * count + at}} for at in range(count)]
        new = [ours.searches(ALL, queries[:1], filter=each)[0] for each in filters]
        pairs.append(
            Pair(*(load.one_by_one(us.server.port, each, count).checked().percentile(50) for each in (new, plain)))
        )
    return compared("search with a filter for the first time, p50", pairs, unit="ms")
