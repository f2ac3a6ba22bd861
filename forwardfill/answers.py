"""What the service answers, as typed dictionaries: the documents of the REST contract."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

Json = dict[str, Any]

Cutover = Literal["progressive", "automatic", "manual"]
Order = Literal["stored", "uncertainty", "most_searched"]
MissingSide = Literal["fail", "zeros", "skip"]
Contradicting = Literal["fail", "ignore"]
State = Literal[
    "pending",
    "validating",
    "running",
    "paused",
    "verifying",
    "awaiting_cutover",
    "completed",
    "finalized",
    "cancelling",
    "cancelled",
    "rolling_back",
    "rolled_back",
    "failed",
]


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


class Measures(TypedDict):
    """What probes found; None where there is nothing to tell it from."""

    probes: int
    judged: int
    k: int
    cmc1: float | None
    recall_at_10: float | None
    map: float | None
    overlap_at_10: float | None
    negative_flips: int | None


class Point(Measures):
    """Quality at some progress."""

    fraction: float


class Refined(Measures):
    """Quality at some refinement."""

    fraction: float
    items: int


class Quality(TypedDict):
    """What was measured with probes; None where there is nothing to measure with."""

    before: Measures | None
    now: Measures | None
    expected_after: Measures | None
    by_progress: list[Point]
    by_refinement: list[Refined]


class Condition(TypedDict):
    """Why an upgrade does not go at full speed."""

    type: str
    since: str
    reason: str
    detail: str


class Pinned(TypedDict):
    """A transformation that an upgrade was started with."""

    transformation: str
    source_model: str
    artifact_sha256: str


class Upgrade(TypedDict):
    """One upgrade."""

    id: str
    gallery: str
    source_model: str
    target_model: str
    transformation: str
    artifact_sha256: str
    pinned: list[Pinned]
    state: State
    cutover: Cutover
    order: Order
    on_missing_side_information: str
    on_contradicting_items: str
    dry_run: bool
    throttle: dict[str, float]
    gate: dict[str, float]
    progress: Progress
    quality: Quality
    #: what validation found
    report: Json
    conditions: list[Condition]
    #: verbs that it takes now
    allowed: list[str]
    #: bytes; None where it cannot be finalized
    finalize_frees: int | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    error: str | None


class Throttle(TypedDict, total=False):
    """How fast an upgrade may go; None removes a limit."""

    items_per_second: float | None
    duty_cycle: float | None
    max_search_p99_ms: float | None
