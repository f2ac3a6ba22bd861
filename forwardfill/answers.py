"""What the service answers, as typed dictionaries: the documents of the REST contract."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

Json = dict[str, Any]


class Hit(TypedDict):
    """One found item; the payload is there if it was asked for."""

    id: str
    score: float
    origin: Literal["native", "derived"]
    payload: NotRequired[Json | None]


class Routes(TypedDict):
    """Items by the route that reached them."""

    direct: int
    forward: int
    backward: int
    unreachable: int


class Served(TypedDict):
    """What served an answer."""

    model: str
    score_space: str
    gallery_version: int
    routes: Routes


class Answer(TypedDict):
    """The answer to one query, best hit first."""

    hits: list[Hit]
    served: Served
    took_ms: float


class Hits(TypedDict):
    """The hits of one query, best first."""

    hits: list[Hit]


class BatchAnswer(TypedDict):
    """The answers to several queries, in their order, all from one gallery version."""

    results: list[Hits]
    served: Served
    took_ms: float


class Progress(TypedDict):
    """How far an upgrade is."""

    items_total: int
    items_done: int
    segments_total: int
    segments_done: int
    segments_failed: int
    fraction: float
    items_per_second: float | None
    eta_seconds: float | None


class Upgrade(TypedDict):
    """One upgrade."""

    id: str
    gallery: str
    source_model: str
    target_model: str
    transformation: str
    artifact_sha256: str
    state: str
    cutover: str
    progress: Progress
    quality: Json
    conditions: list[Json]
    created_at: str
    started_at: str | None
    finished_at: str | None
    error: str | None


class Throttle(TypedDict, total=False):
    """How fast an upgrade may go; None removes a limit."""

    items_per_second: float | None
    duty_cycle: float | None
    max_search_p99_ms: float | None
