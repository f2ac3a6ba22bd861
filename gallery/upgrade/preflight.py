"""Before the first write: can this upgrade work, and what will it take? Measured, with reasons.

Each check tells what it found, or refuses. All of them are made, whatever one says, so that an operator mends everything at
once; only where the artifact itself is refused, those that would use it are left out.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy.orm import Session

from gallery import errors, paths
from gallery.catalog import items as item_rows
from gallery.catalog import models as model_rows
from gallery.catalog import segments as segment_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ArtifactRow, GalleryRow, SegmentRow, UpgradeRow
from gallery.catalog.transaction import UNANSWERED, in_words
from gallery.columns import open_column, verify
from gallery.heartbeat import Stopped
from gallery.index.choose import choose
from gallery.spaces import Transformation
from gallery.store import Store
from gallery.transforms import SAMPLE_ROWS, artifact_file, computed_in
from gallery.upgrade import known_answers, memory, sources, throttle

_HEADROOM = 1.1  # index files hold a little more than vectors, and the catalog grows too

#: gives facts for the report, and what they mean in words. An exception is a refusal, unless it says that nothing was found out
Check = Callable[[], tuple[Mapping[str, Any], str]]


@dataclass(slots=True)
class Report:
    """What the checks found."""

    facts: dict[str, Any] = field(default_factory=dict)
    #: in the order in which they were made
    checks: list[dict[str, Any]] = field(default_factory=list)

    def make(self, name: str, check: Check) -> bool:
        """Make a check; whether it passed."""
        try:
            facts, detail = check()
        except (*UNANSWERED, Stopped):
            raise  # nothing was found out, so the step is done again
        except Exception as error:  # noqa: BLE001 - whatever stops the measuring is a reason not to start
            self.refuse(name, in_words(error))
            self.facts.update(error.details if isinstance(error, errors.GalleryError) else {})
            return False
        self.facts.update(facts)
        self.checks.append({"check": name, "passed": True, "detail": detail})
        return True

    def refuse(self, name: str, detail: str) -> None:
        """Record a check that did not pass."""
        self.checks.append({"check": name, "passed": False, "detail": detail})

    @property
    def error(self) -> str | None:
        """Every refusal; None if there is none."""
        return "; ".join(check["detail"] for check in self.checks if not check["passed"]) or None

    def told(self) -> dict[str, Any]:
        """As the upgrade's document shows it."""
        return {**self.facts, "checks": self.checks}


def preflight(store: Store, row: UpgradeRow) -> Report:
    """Check an upgrade against its artifact, the gallery, the disk and the memory."""
    report, work = Report(), _Work(store, row)
    if report.make("artifact", work.artifact) and report.make("transformation", work.sample):
        report.make("known_answers", lambda: known_answers.check(store, row, work.used))
    report.make("side_information", work.side_information)
    report.make("disk", work.disk)
    report.make("memory", work.memory)
    return report


class _Work:
    """What an upgrade has before it."""

    def __init__(self, store: Store, row: UpgradeRow) -> None:
        self.store = store
        self.row = row
        with store.catalog.reading() as session:
            self.gallery = session.get_one(GalleryRow, row.gallery_id)
            self.architecture = session.get_one(ArtifactRow, row.artifact).architecture
            #: each with what its new column is made from, if there is such a thing
            work = upgrade_rows.work(session, row)
            self.segments = list(zip(work, sources.of_segments(session, row, work), strict=True))
            self.transformations = upgrade_rows.transformations(session, row)
            self.without_side = _without_side(session, row, work, self.transformations)
            self.items = sum(upgrade_rows.counts(session, row.id).items.values())

    @property
    def used(self) -> list[Transformation]:
        """The transformations that columns will be made by; first the main one, which counts even if no segment needs it."""
        chosen = {made_from.transformation.name for _, made_from in self.segments if made_from is not None}
        main, *others = self.transformations
        return [main, *(each for each in others if each.name in chosen)]

    @property
    def indexed(self) -> list[int]:
        """Rows of the segments whose new columns get an index file."""
        rows = [segment.rows for segment, _ in self.segments]
        exact_below = self.store.settings.exact_below
        return [each for each in rows if choose(self.gallery.index, rows=each, exact_below=exact_below)]

    def artifact(self) -> tuple[Mapping[str, Any], str]:
        """The bytes are those that were registered, and they are of this direction and these dimensions."""
        for each in self.used:
            verify(self.store.files, artifact_file(each.artifact), each.artifact)
        row, declared = self.row, self.architecture
        ends = [declared["source_dimension"], declared["target_dimension"]]
        if row.transformation.direction != "forward" or ends != [row.source.dimension, row.target.dimension]:
            raise errors.WrongTransformation(
                f"{row.transformation.name} is {row.transformation.direction} from dimension {ends[0]} to {ends[1]}, and the "
                f"upgrade leads from {row.source.name} with {row.source.dimension} to {row.target.name} with "
                f"{row.target.dimension}"
            )
        return {}, f"its bytes have their SHA-256; forward, from dimension {ends[0]} to {ends[1]}"

    def sample(self) -> tuple[Mapping[str, Any], str]:
        """Stored vectors go through it, and come out finite; how fast is measured."""
        having = [(segment, made_from) for segment, made_from in self.segments if made_from is not None]
        if not having:
            unknown = dict.fromkeys(("items_per_second", "computed_in", "estimated_seconds"))
            return {"items": self.items, **unknown}, "there is no segment that can be transformed"
        segment, made_from = max(having, key=lambda each: each[0].rows)
        path, by = self.store.files.path, made_from.transformation
        vectors = open_column(path(made_from.column.file), rows=segment.rows, dimension=made_from.dimension)
        side = None
        if segment.side_file is not None and by.side_dimension is not None:
            side = open_column(path(segment.side_file), rows=segment.rows, dimension=by.side_dimension)[:SAMPLE_ROWS]
        vectors = vectors[:SAMPLE_ROWS]
        rate, number_type = self._measured(by, vectors, side)
        seconds = throttle.predicted_seconds(self.row.throttle, self.items, len(self.segments), rate)
        facts = {
            "items": self.items,
            "items_per_second": rate,
            "computed_in": number_type,
            "estimated_seconds": seconds,
        }
        return (
            facts,
            f"{rate:.0f} items a second in {number_type} on a sample of {len(vectors)}: about {seconds:.0f} s for {self.items} "
            f"items in {len(self.segments)} segments, as it is throttled now; indexes come on top",
        )

    def _measured(self, by: Transformation, vectors: Any, side: Any) -> tuple[float, str]:
        """Items per second, and in which number type; the first pass is not counted: it loads the artifact and the columns."""
        target, transforms = model_rows.as_model(self.row.target), self.store.transforms
        name, source = by.name, by.source
        try:
            loaded = transforms.in_bulk(by, vectors, side)
            mapped = next(transforms.apply_each(loaded, by, target, [(vectors, side)]))
            started = time.perf_counter()
            next(transforms.apply_each(loaded, by, target, [(vectors, side)]))
            seconds = time.perf_counter() - started
        except errors.GalleryError:
            raise
        except Exception as error:
            raise errors.WrongTransformation(f"{name} cannot map stored vectors of {source}: {error!r}") from error
        if mapped.shape != (len(vectors), target.dimension) or not np.isfinite(mapped).all():
            raise errors.WrongTransformation(
                f"{name} gives no finite vectors of dimension {target.dimension} from stored vectors of {source}"
            )
        return len(vectors) / seconds, computed_in(loaded)

    def side_information(self) -> tuple[Mapping[str, Any], str]:
        """How many items lack it, and what each policy would do to them."""
        name, policy = self.row.transformation.name, self.row.missing_side
        needed = any(each.side_dimension is not None for each in self.transformations)
        left_out, with_zeros = self.without_side
        missing = with_zeros if policy == "zeros" else left_out
        facts: dict[str, Any] = {
            "items_without_side_information": missing,
            "on_missing_side_information": {
                "fail": f"{'refuses to start' if left_out else 'changes nothing'}",
                "zeros": f"maps {with_zeros} items with zeros in its place",
                "skip": f"leaves {left_out} items as they are, which queries of {self.row.target.name} reach only where a "
                "backward transformation serves them, or as a partial answer",
            },
        }
        if missing and policy == "fail":
            raise errors.MissingSideInformation(
                f"{missing} items have no side-information, which {name} needs: store it, or start the upgrade "
                "with on_missing_side_information `zeros` or `skip`",
                **facts,
            )
        if not needed:
            return facts, f"{name} needs none"
        return facts, f"{missing} of {self.items} items lack it; the policy is {policy}"

    def disk(self) -> tuple[Mapping[str, Any], str]:
        """Whether the new columns and their indexes fit."""
        dimension, itemsize = self.row.target.dimension, np.dtype(self.gallery.storage_dtype).itemsize
        needed = int((self.items * itemsize + sum(self.indexed) * 4) * dimension * _HEADROOM)
        free = shutil.disk_usage(self.store.files.root).free
        facts: dict[str, Any] = {"bytes_needed": needed, "bytes_free": free}
        if needed > free:
            raise errors.LimitExceeded(
                f"the new columns and indexes need about {needed} bytes, and the disk has {free} free", **facts
            )
        return facts, f"the new columns and indexes need about {needed} bytes; {free} are free"

    def memory(self) -> tuple[Mapping[str, Any], str]:
        """Whether a worker on this machine has room for its blocks, and for the largest indexes."""
        row, settings = self.row, self.store.settings
        needed = memory.needed(
            block=settings.block_rows,
            dimensions=(row.source.dimension, row.transformation.side_dimension, row.target.dimension),
            architecture=self.architecture,
            indexed_rows=max(self.indexed, default=0),
            segments=settings.segments_at_once,
        )
        free = memory.free()
        facts: dict[str, Any] = {"memory_needed": needed, "memory_free": free}
        if free is not None and needed > free:
            raise errors.LimitExceeded(
                f"a worker takes about {needed} bytes of memory at once, and {free} are free: free some, or lower the "
                "segments at once (FORWARDFILL_SEGMENTS_AT_ONCE) or the rows of a segment (FORWARDFILL_COMPACT_ROWS)",
                **facts,
            )
        return (
            facts,
            f"a worker takes about {needed} bytes at once; {'an unknown number' if free is None else free} are free",
        )


class _WithoutSide(NamedTuple):
    """Live items without the side-information that their transformation needs; the policy decides which one that is."""

    #: without zeros for it, none of the transformations can make their column
    left_out: int
    #: with zeros allowed, they would be transformed with zeros
    with_zeros: int


def _without_side(
    session: Session, row: UpgradeRow, work: Sequence[SegmentRow], pinned: Sequence[Transformation]
) -> _WithoutSide:
    columns = segment_rows.columns_of(session, [segment.id for segment in work])
    found: dict[bool, list[int]] = {False: [], True: []}
    for segment in work:
        made = sources.made(columns.get(segment.id, {}))
        for zeros, lacking in found.items():
            by = paths.source(made, segment.side_dimension, row.target.name, pinned, zeros=zeros)
            if (not zeros) if by is None else not by.takes(segment.side_dimension):
                lacking.append(segment.id)
    return _WithoutSide(*(item_rows.live_in(session, lacking) for lacking in found.values()))
