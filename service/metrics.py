"""What a process counts, for Prometheus: requests, searches, items that were written. And how slow its searches were of late."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate

import orjson
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from gallery.search.hits import Hits
from gallery.search.request import Answer
from gallery.search.routes import Coverage
from service.group import Group

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_OUTCOMES = ("answered", "partial", "refused", "failed")
_WINDOW_SECONDS = 5.0


class Counts(Collector):
    """What was counted. One lock and plain additions, because each search counts a dozen things."""

    def __init__(self) -> None:
        """Start at zero."""
        self._lock = threading.Lock()
        #: searches by how they ended, and items by the route that reached them. All series begin at zero: Prometheus takes
        #: the first value that it sees for an old one, and an alert would miss the first failure.
        self._ended: Counter[str] = Counter(dict.fromkeys(_OUTCOMES, 0))
        self._reached: Counter[str] = Counter(dict.fromkeys(Coverage._fields, 0))
        self._within = [0] * (len(_SECONDS) + 1)
        self._seconds = 0.0
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._upserted = 0

    def ended(self, outcome: str) -> None:
        """One search ended without an answer."""
        with self._lock:
            self._ended[outcome] += 1

    def answered(self, coverage: Coverage, seconds: Sequence[float]) -> None:
        """Searches with the same coverage were answered."""
        with self._lock:
            self._ended["partial" if coverage.unreachable else "answered"] += len(seconds)
            for each in seconds:
                self._seconds += each
                self._within[bisect_left(_SECONDS, each)] += 1
            for route, items in zip(Coverage._fields, coverage, strict=True):
                self._reached[route] += items * len(seconds)

    def requested(self, method: str, route: str, status: int) -> None:
        """One request ended."""
        with self._lock:
            self._requests[method, route, status] += 1

    def upserted(self, items: int) -> None:
        """Items were written."""
        with self._lock:
            self._upserted += items

    def add(self, written: bytes) -> None:
        """Add what another process counted, as `as_bytes` of it."""
        other = orjson.loads(written)
        with self._lock:
            self._ended.update(other["ended"])
            self._reached.update(other["reached"])
            self._within = [ours + theirs for ours, theirs in zip(self._within, other["within"], strict=True)]
            self._seconds += other["seconds"]
            self._requests.update({(method, route, status): n for method, route, status, n in other["requests"]})
            self._upserted += other["upserted"]

    def as_bytes(self) -> bytes:
        """Everything, for `add`."""
        with self._lock:
            return orjson.dumps(
                {
                    "ended": dict(self._ended),
                    "reached": dict(self._reached),
                    "within": self._within,
                    "seconds": self._seconds,
                    "requests": [[*request, number] for request, number in self._requests.items()],
                    "upserted": self._upserted,
                }
            )

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        with self._lock:
            ended, reached, requests = dict(self._ended), dict(self._reached), dict(self._requests)
            within, seconds, upserted = list(accumulate(self._within)), self._seconds, self._upserted
        yield HistogramMetricFamily(
            "forwardfill_search_seconds",
            "Time from a parsed search to its answer.",
            buckets=list(zip([*map(floatToGoString, _SECONDS), "+Inf"], within, strict=True)),
            sum_value=seconds,
        )
        yield _counter("forwardfill_searches", "Searches by how they ended.", {"outcome": ended})
        yield _counter("forwardfill_searched_items", "Items that searches reached, by route.", {"route": reached})
        yield CounterMetricFamily("forwardfill_upserted_items", "Items that were written.", value=upserted)
        by_route = CounterMetricFamily(
            "forwardfill_http_requests", "Requests by route and status.", labels=["method", "route", "status"]
        )
        for (method, route, status), number in requests.items():
            by_route.add_metric([method, route, str(status)], number)
        yield by_route


def _counter(name: str, help_: str, counted: dict[str, dict[str, int]]) -> Metric:
    ((label, numbers),) = counted.items()
    family = CounterMetricFamily(name, help_, labels=[label])
    for value, number in numbers.items():
        family.add_metric([value], number)
    return family


class Metrics:
    """Everything that one application counts."""

    def __init__(self, group: Group | None = None) -> None:
        """Start at zero, or where the process ended that had this place in the group before."""
        self.counts = Counts()
        self.latencies = Latencies()
        self.hits = Hits()
        self._group = group
        self._sharing = threading.Lock()
        if group is not None and group.own_counts.exists():
            self.counts.add(group.own_counts.read_bytes())

    def answered(self, answers: Sequence[Answer], seconds: Sequence[float]) -> None:
        """Count one search or batch that was answered in parts, or several searches by one call; `seconds` has each one's."""
        first = answers[0]
        self.counts.answered(first.coverage, seconds)
        for each in seconds:
            self.latencies.record(first.snapshot.gallery_id, each)
        for answer in answers:
            self.hits.count(answer)

    def share(self) -> None:
        """Let the other processes of the group know what was counted here."""
        if self._group is None:
            return
        own = self._group.own_counts
        with self._sharing:
            part = own.with_suffix(".part")
            part.write_bytes(self.counts.as_bytes())
            part.replace(own)

    def as_text(self) -> bytes:
        """What all processes behind this port have counted, in Prometheus's format.

        Only shared counts are added up, by every process in the same order, so that a counter never falls from one answer to
        the next, whichever process gives it: Prometheus would take that for a restart.
        """
        if self._group is None:
            return bytes(generate_latest(self.counts))
        self.share()
        counts = Counts()
        for file in self._group.all_counts():
            counts.add(file.read_bytes())
        return bytes(generate_latest(counts))


class Latencies:
    """How long recent searches of each gallery took. Written without a lock, since appending to a deque is atomic."""

    def __init__(self) -> None:
        """Start empty."""
        self._recent: dict[int, deque[tuple[float, float]]] = {}

    def record(self, gallery_id: int, seconds: float) -> None:
        """One search was answered."""
        recent = self._recent.get(gallery_id)
        if recent is None:
            self._forget()
            recent = self._recent.setdefault(gallery_id, deque(maxlen=8192))
        moment = time.monotonic()
        recent.append((moment, seconds * 1000))
        # Of each of hundreds of galleries, the last 8,192 took a megabyte for as long as it was searched now and then.
        with suppress(IndexError):  # another thread took the last
            while recent[0][0] < moment - _WINDOW_SECONDS:
                recent.popleft()

    def _forget(self) -> None:
        """Forget galleries that nobody searches any more: they may be deleted, and their ids never come again."""
        since = time.monotonic() - _WINDOW_SECONDS
        for gallery_id, recent in list(self._recent.items()):
            if recent and recent[-1][0] < since:
                self._recent.pop(gallery_id, None)

    def p99_ms(self, gallery_id: int) -> float:
        """The 99th percentile over the last seconds; 0 if nobody searched."""
        since = time.monotonic() - _WINDOW_SECONDS
        taken = sorted(took for at, took in self._recent.get(gallery_id, deque()).copy() if at >= since)
        return taken[min(len(taken) - 1, int(len(taken) * 0.99))] if taken else 0.0
