"""An upgrade as JSON: what may be asked for, and what is told."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat
from sqlalchemy.orm import Session

from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import UpgradeRow, UpgradeSegmentRow
from gallery.upgrade import lifecycle, moves, progress
from gallery.upgrade.plan import Order
from gallery.upgrade.refinement import Refined as Counted
from gallery.upgrade.states import State
from service.bodies import Body, Reference
from service.refinement import Listed

Cutover = Literal["progressive", "automatic", "manual"]
Share = Annotated[float, Field(ge=0, le=1)]


class Throttle(Body):
    """How fast it may go; null removes a limit."""

    items_per_second: float | None = Field(default=None, gt=0)
    duty_cycle: float | None = Field(
        default=None, gt=0, le=1, description="Fraction of the time that a worker works on it."
    )
    max_search_p99_ms: float | None = Field(
        default=None, gt=0, description="It waits while the p99 of searches is higher."
    )


class Gate(Body):
    """Limits of the quality that probes measure. Beyond them an upgrade does not begin, pauses, or does not cut over."""

    min_cmc1: Share | None = Field(default=None, description="Least share of probes whose first hit is relevant.")
    min_recall_at_10: Share | None = Field(default=None, description="Least share of the relevant ids among ten hits.")
    min_map: Share | None = Field(default=None, description="Least mean average precision over the ten hits.")
    min_overlap_at_10: Share | None = Field(
        default=None,
        description="Least share of a source-model query's ten hits that are still hits; needs no relevant ids.",
    )
    max_negative_flips: int | None = Field(
        default=None, ge=0, description="Most probes whose first hit was relevant before and is not now."
    )
    max_cmc1_drop: Share | None = Field(default=None, description="How much lower than before it may be.")
    max_recall_drop: Share | None = Field(default=None, description="Of `recall_at_10`.")
    max_map_drop: Share | None = None


class UpgradeBody(Body):
    """Which gallery to upgrade, and by which transformation, or to which model by the latest one."""

    gallery: Reference
    transformation: Reference | None = None
    target_model: Reference | None = None
    cutover: Cutover = "progressive"
    order: Literal["stored", "uncertainty", "most_searched"] = Field(
        default="stored",
        description="Of the segments: as stored, least certain first (needs an uncertainty head), or most searched first.",
    )
    throttle: Throttle = Throttle()
    gate: Gate = Gate()
    on_missing_side_information: Literal["fail", "zeros", "skip"] = "fail"
    on_contradicting_items: Literal["fail", "ignore"] = Field(
        default="fail",
        description="Items that came again in the target model tell whether the transformation is the right one, unless what "
        "they are had changed: then `ignore` them.",
    )
    score_thresholds: list[FiniteFloat] = Field(
        default=[],
        max_length=20,
        description="Thresholds on the scores of source-model queries; the report names those that replace them.",
    )
    dry_run: bool = Field(default=False, description="Check and report, and change nothing.")

    def meant(self) -> dict[str, Any]:
        """What an idempotency key stands for, in the words of the first release, so that keys outlive an update.

        What a later release can be asked for is named where it is asked for.
        """
        later = {"on_contradicting_items"}
        return self.model_dump(exclude=later) | self.model_dump(include=later, exclude_defaults=True)


class ThrottleBody(Body):
    """New limits."""

    throttle: Throttle


class CutoverBody(Body):
    """Consent to a quality below the gate."""

    accept_below_gate: bool = Field(default=False, description="Let it serve although it missed its gate.")


class NothingBody(Body):
    """This verb takes no options; unknown fields are refused."""


class UndoBody(Body):
    """Consent to the cost of an undo."""

    accept_unreachable: bool = Field(
        default=False,
        description="Accept that source-model queries may not find items that were stored in the target model.",
    )


class Progress(BaseModel):
    """Counted from rows."""

    items_total: int
    items_done: int
    segments_total: int
    segments_done: int
    segments_failed: int
    fraction: float
    items_per_second: float | None
    eta_seconds: float | None


class Measures(BaseModel):
    """What the probes found; null where it cannot be computed."""

    probes: int = Field(description="Probes that were asked.")
    judged: int = Field(default=0, description="Probes with known relevant ids.")
    k: int = Field(default=10, description="Hits of each probe.")
    cmc1: float | None = Field(default=None, description="Share of the judged ones whose first hit is relevant.")
    recall_at_10: float | None = Field(
        default=None, description="Share of the relevant ids, at most ten each, among the hits."
    )
    map: float | None = Field(
        default=None,
        description="Mean average precision over the hits; relevant ids that are not among them count as missed.",
    )
    overlap_at_10: float | None = Field(
        default=None, description="Share of the source model's hits that are still hits; over all probes."
    )
    negative_flips: int | None = Field(
        default=None,
        description="Judged probes whose first hit is relevant for the source model's query, and not for the target model's.",
    )


class Point(Measures):
    """Quality at some progress."""

    fraction: float = Field(description="Fraction of the items that was done.")


class Refined(Measures):
    """Quality at some refinement."""

    fraction: float = Field(description="Fraction of the items whose vector the target model itself made.")
    items: int = Field(description="Number of these items.")


class Quality(BaseModel):
    """What was measured with probes; null where there is nothing to measure with."""

    before: Measures | None = Field(description="Queries of the source model, when `now` was measured.")
    now: Measures | None = Field(description="Queries of the target model, over what searches see.")
    expected_after: Measures | None = Field(
        description="Queries of the target model over the whole gallery, every item transformed; before the cutover of "
        "an upgrade that is not progressive, over the upgraded columns themselves."
    )
    by_progress: list[Point] = Field(description="`now` while a progressive upgrade ran; at most 128 points, evenly.")
    by_refinement: list[Refined] = Field(
        description="Queries of the target model after the upgrade, while items were embedded again; at most 128 points."
    )


class Condition(BaseModel):
    """Why the upgrade does not run at full speed."""

    type: str
    since: datetime
    reason: str
    detail: str


class Pinned(BaseModel):
    """A transformation that an upgrade was started with."""

    transformation: str
    source_model: str
    artifact_sha256: str


class Upgrade(BaseModel):
    """The present state of an upgrade."""

    id: str
    gallery: str
    source_model: str
    target_model: str
    transformation: str
    artifact_sha256: str
    pinned: list[Pinned] = Field(
        description="Every transformation that it may use, that one first: per segment, the one that leaves the fewest "
        "transformations between its vectors and those that a model made."
    )
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
    report: dict[str, Any] = Field(
        description="What validation found: `checks`, each passed or not and why; items, and what lacks side-information; "
        "bytes of disk and memory needed and free, seconds estimated; `known_answers`; `score_thresholds`; and where the "
        "order is not `stored`, the segments that go first and why."
    )
    conditions: list[Condition]
    allowed: list[str] = Field(description="Verbs that are possible now.")
    finalize_frees: int | None = Field(
        description="Bytes that a finalize would free now; null where it is not possible."
    )
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None


class Upgrades(BaseModel):
    """A page of upgrades, the newest first."""

    upgrades: list[Upgrade]
    next_page_token: str | None


class Failure(BaseModel):
    """A segment that failed too often and was set aside."""

    segment: int
    items: int
    attempts: int
    error: str | None


class Failures(BaseModel):
    """A page of failed segments."""

    failures: list[Failure]
    next_page_token: str | None


class Refinement(BaseModel):
    """Ids in the order in which embedding them from raw data pays most, and what it paid so far."""

    ids: list[str]
    next_page_token: str | None
    native_items: int = Field(description="Items whose vector the target model itself made.")
    derived_items: int = Field(description="Items that could still be embedded again; as many as this list has ids.")
    fraction: float = Field(description="Fraction of native items.")
    quality: list[Refined] = Field(
        description="Measured with probes as `fraction` grew; of the upgrade's `quality` too."
    )
    predicted_variance_left: list[float] = Field(
        description="After each tenth of this list, from none of it to all: the share of the variance that the "
        "transformation predicts which is left. Where it hardly falls any more, embedding again hardly pays."
    )


def upgrade_documents(session: Session, rows: Sequence[UpgradeRow]) -> list[Upgrade]:
    """The present state of each of these upgrades."""
    stacks = upgrade_rows.open_in(session, {row.gallery_id for row in rows if row.gallery_id is not None})
    return [_document(session, row, [] if row.gallery_id is None else stacks[row.gallery_id]) for row in rows]


def _document(session: Session, row: UpgradeRow, stack: Sequence[UpgradeRow]) -> Upgrade:
    """An upgrade among the open ones of its gallery."""
    return Upgrade(
        id=row.id,
        gallery=row.gallery_name,
        source_model=row.source.name,
        target_model=row.target.name,
        transformation=row.transformation.name,
        artifact_sha256=row.artifact,
        pinned=[
            Pinned(transformation=each.name, source_model=each.source, artifact_sha256=each.artifact)
            for each in upgrade_rows.transformations(session, row)
        ],
        state=State(row.state),
        cutover=row.cutover,  # type: ignore[arg-type]
        order=Order(row.order),
        on_missing_side_information=row.missing_side,
        on_contradicting_items=row.contradicting,
        dry_run=row.dry_run,
        throttle=row.throttle,
        gate=row.gate,
        progress=progress_document(session, row),
        quality=Quality(**progress.quality(row)),
        report=row.report,
        conditions=[Condition.model_validate(each, from_attributes=True) for each in progress.conditions(session, row)],
        allowed=moves.takes(row, stack),
        finalize_frees=lifecycle.would_free(session, row, stack),
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        error=row.error,
    )


def progress_document(session: Session, row: UpgradeRow) -> Progress:
    """How far an upgrade is."""
    return Progress.model_validate(progress.progress(session, row), from_attributes=True)


def failure_document(row: UpgradeSegmentRow) -> Failure:
    """A segment that failed too often and was set aside."""
    return Failure(segment=row.segment_id, items=row.rows, attempts=row.attempts, error=row.error)


def refinement_document(row: UpgradeRow, counted: Counted, listed: Listed, after: str | None) -> Refinement:
    """A page of the ids that pay most, and `after`, the token of the next page."""
    return Refinement(
        ids=listed.ids,
        next_page_token=after,
        native_items=counted.native,
        derived_items=counted.derived,
        fraction=counted.fraction,
        quality=[Refined(**point) for point in progress.quality(row)["by_refinement"]],
        predicted_variance_left=listed.left,
    )
