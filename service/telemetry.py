"""What an operator sees: a request id on every answer, one log event per request, metrics. Never vectors, never keys."""

from __future__ import annotations

import logging
import re
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, MutableMapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from itertools import accumulate, count
from typing import Any

import orjson
import structlog
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as Upserted
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from gallery.search.hits import Hits
from gallery.search.request import Answer
from gallery.search.routes import Coverage
from service.errors import InternalError, PageNotFound, problem

log = structlog.get_logger()
#: of the request under way, for every event that it gives rise to
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

#: names requests whose clients did not: unlike any other, and made in no time
_PROCESS, _numbers = str(ULID()), count(1)
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_WINDOW_SECONDS = 5.0
_QUIET = frozenset({"/health/live", "/health/ready", "/metrics"})


class Searches(Collector):
    """How searches ended, what they reached, and how long they took: counted by a lock and additions, for each counts."""

    def __init__(self) -> None:
        """Start at zero."""
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self._reached: Counter[str] = Counter(dict.fromkeys(Coverage._fields, 0))
        self._within = [0] * (len(_SECONDS) + 1)
        self._seconds = 0.0

    def count(self, outcome: str) -> None:
        """One search ended without an answer."""
        with self._lock:
            self._outcomes[outcome] += 1

    def answered(self, coverage: Coverage, seconds: Sequence[float]) -> None:
        """Searches with the same coverage were answered."""
        with self._lock:
            self._outcomes["partial" if coverage.unreachable else "answered"] += len(seconds)
            for each in seconds:
                self._seconds += each
                self._within[bisect_left(_SECONDS, each)] += 1
            for route, items in zip(Coverage._fields, coverage, strict=True):
                self._reached[route] += items * len(seconds)

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        with self._lock:
            outcomes, reached = dict(self._outcomes), dict(self._reached)
            within, seconds = list(accumulate(self._within)), self._seconds
        ends = [*map(floatToGoString, _SECONDS), "+Inf"]
        yield HistogramMetricFamily(
            "forwardfill_search_seconds",
            "Time from a parsed search to its answer.",
            buckets=list(zip(ends, within, strict=True)),
            sum_value=seconds,
        )
        ended = CounterMetricFamily("forwardfill_searches", "Searches by how they ended.", labels=["outcome"])
        for outcome, number in outcomes.items():
            ended.add_metric([outcome], number)
        yield ended
        items = CounterMetricFamily(
            "forwardfill_searched_items", "Items that searches reached, by route.", labels=["route"]
        )
        for route, number in reached.items():
            items.add_metric([route], number)
        yield items


class Requests(Collector):
    """Requests by route and status."""

    def __init__(self) -> None:
        """Start at zero."""
        self._lock = threading.Lock()
        self._counted: Counter[tuple[str, str, int]] = Counter()

    def count(self, method: str, route: str, status: int) -> None:
        """One request ended."""
        with self._lock:
            self._counted[method, route, status] += 1

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        with self._lock:
            counted = dict(self._counted)
        requests = CounterMetricFamily(
            "forwardfill_http_requests", "Requests by route and status.", labels=["method", "route", "status"]
        )
        for (method, route, status), number in counted.items():
            requests.add_metric([method, route, str(status)], number)
        yield requests


class Metrics:
    """The counters of one application, in a registry of its own."""

    def __init__(self) -> None:
        """Start at zero."""
        self.registry = CollectorRegistry()
        self.searches, self.requests = Searches(), Requests()
        self.registry.register(self.searches)
        self.registry.register(self.requests)
        self.upserted = Upserted("forwardfill_upserted_items", "Items that were written.", registry=self.registry)
        self.latencies = Latencies()
        self.hits = Hits()

    def answered(self, answers: Sequence[Answer], seconds: Sequence[float]) -> None:
        """One search or batch was answered in parts, or several searches by one call; with the seconds of each."""
        first = answers[0]
        self.searches.answered(first.coverage, seconds)
        for each in seconds:
            self.latencies.record(first.snapshot.gallery_id, each)
        for answer in answers:
            self.hits.count(answer)


class Latencies:
    """How slow the searches of each gallery were of late; written without a lock, since appending to a deque is atomic."""

    def __init__(self) -> None:
        """Start empty."""
        self._recent: dict[int, deque[tuple[float, float]]] = {}

    def record(self, gallery_id: int, seconds: float) -> None:
        """One search was answered."""
        recent = self._recent.get(gallery_id)
        if recent is None:
            recent = self._recent.setdefault(gallery_id, deque(maxlen=8192))
        recent.append((time.monotonic(), seconds * 1000))

    def p99_ms(self, gallery_id: int) -> float:
        """The 99th percentile of the last seconds; 0 where nobody searched, and so nobody suffers."""
        since = time.monotonic() - _WINDOW_SECONDS
        taken = sorted(took for at, took in self._recent.get(gallery_id, deque()).copy() if at >= since)
        return taken[min(len(taken) - 1, int(len(taken) * 0.99))] if taken else 0.0


class Telemetry:
    """Outermost: names each request, logs it, counts it, and answers what no handler caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wrap `app`."""
        self._app = app
        self._metrics = metrics
        self._log: Any = log.bind()  # what is bound already costs half

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = next(_sane_ids(scope), None) or f"{_PROCESS}-{next(_numbers)}"
        scope.setdefault("state", {})["request_id"] = request_id
        _request_id.set(request_id)
        answer = _Answer(send, request_id)
        started = time.perf_counter()
        try:
            await self._answered(scope, receive, answer)
        finally:
            self._account(scope, answer.status, time.perf_counter() - started)

    async def _answered(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            if "\0" in scope["path"]:  # no name holds one, and PostgreSQL cannot even be asked for it
                await problem(PageNotFound("there is nothing at this path"), answer.request_id)(scope, receive, answer)
                return
            await self._app(scope, receive, answer)
        except ClientDisconnect:
            answer.status = answer.status or 499  # nobody is left to hear it
        except Exception as error:
            log.exception("request_crashed", error=repr(error))
            if not answer.status:
                await problem(InternalError(""), answer.request_id)(scope, receive, answer)
            elif not answer.whole:
                raise  # part of the answer is gone already; the server closes the connection

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.requests.count(scope["method"], route, status)
        if scope["path"] not in _QUIET:
            self._log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                milliseconds=round(seconds * 1000, 2),
            )


class _Answer:
    """Sends, with the request id in the headers, and remembers the status."""

    __slots__ = ("_send", "request_id", "status", "whole")

    def __init__(self, send: Send, request_id: str) -> None:
        self.request_id = request_id
        self.status = 0
        #: nothing is left to be sent
        self.whole = False
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
            message = {**message, "headers": [*headers, (b"x-request-id", self.request_id.encode())]}
        else:
            self.whole = not message.get("more_body", False)
        await self._send(message)


def _sane_ids(scope: Scope) -> Iterator[str]:
    """The client's own request id, if it can be logged and sent back as it is."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(text := value.decode("latin-1")):
            yield text


def configure_logs() -> None:
    """One JSON object per line on standard output, events with fields."""
    structlog.configure(
        processors=[_as_line],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.BytesLoggerFactory(),
    )


def _as_line(logger: Any, level: str, event: MutableMapping[str, Any]) -> bytes:
    """An event as JSON. One processor, since each request is an event and each processor costs it a microsecond or more."""
    if "exc_info" in event:
        event = structlog.processors.format_exc_info(logger, level, event)
    event["level"] = level
    event["timestamp"] = datetime.now(UTC)
    if request_id := _request_id.get():
        event["request_id"] = request_id
    return orjson.dumps(event, default=repr, option=orjson.OPT_UTC_Z)
