"""Before the first write: can this upgrade work, and is it worth it? Measured, with reasons.

Probes are queries with known vectors, in the source and in the target model, and, where known, the ids that are relevant.
With them quality is measured by the same search that serves: `before` with the source model, `expected_after` with the target
model over candidates that are mapped at query time, `now` with the target model as the gallery stands.
"""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from gallery import errors
from gallery.arrays import Vectors
from gallery.catalog import items as item_rows
from gallery.catalog import models as model_rows
from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.tables import ColumnRow, GalleryRow, ProbeRow, SegmentRow, UpgradeRow
from gallery.columns import open_column
from gallery.search.request import SearchRequest
from gallery.search.run import Searcher
from gallery.snapshot import Galleries, World
from gallery.store import Store
from gallery.upgrade import order
from gallery.upgrade.lifecycle import locked, move
from gallery.upgrade.plan import Candidate, Order
from gallery.upgrade.states import State

RECALL_AT = 10
_SAMPLE_ROWS = 1024
_HEADROOM = 1.1  # index files and the catalog grow too
#: what a gate may ask for, and the measure that it is compared with
LIMITS: Mapping[str, str] = {"min_cmc1": "cmc1", "min_recall_at_10": "recall_at_10"}


def validate(store: Store, galleries: Galleries, searcher: Searcher, upgrade_id: str) -> bool:
    """Take an upgrade from `pending` to `running`, or to `failed` with the reason. Safe to repeat."""
    with store.catalog.transaction() as tx:
        row = upgrade_rows.upgrade_row(tx.session, upgrade_id, lock=True)
        if row.state == State.PENDING:
            move(tx.session, row, State.VALIDATING)
        if row.state != State.VALIDATING:
            return False
    work: list[Candidate] = []
    try:
        report, quality = _report(store, row), _expect(store, galleries, searcher, row)
        error = _shortfall(row.gate, quality)
        if error is None:
            work = order.measure(store, row)
            report.update(order.told(work, Order(row.order)))
    except Exception as caught:  # noqa: BLE001 - whatever stops the measuring is a reason not to start
        report, quality, error = {}, {}, f"{type(caught).__name__}: {caught}"
    with store.catalog.transaction() as tx:
        row, _ = locked(tx.session, upgrade_id)
        if row.state != State.VALIDATING:
            return False
        row.report, row.quality, row.error = {**row.report, **report}, {**row.quality, **quality}, error
        upgrade_rows.reorder(tx.session, row.id, (each.segment_id for each in work))
        then = State.FAILED if error else State.COMPLETED if row.dry_run else State.RUNNING
        move(tx.session, row, then, **({"error": error} if error else {}))
    return True


def measure_now(store: Store, galleries: Galleries, searcher: Searcher, upgrade_id: str) -> dict[str, Any]:
    """Quality of target-model queries as the gallery stands; nothing without probes."""
    with store.catalog.reading() as session:
        row = upgrade_rows.upgrade_row(session, upgrade_id)
        probes = upgrade_rows.probes(session, row.gallery_id or 0)
    if not probes or row.cutover != "progressive":
        return {}
    measured = measure(galleries.refresh(), searcher, row.gallery_name, row.target.name, probes)
    return {"now": measured} if measured else {}


def measure(
    world: World,
    searcher: Searcher,
    gallery: str,
    model: str,
    probes: Sequence[ProbeRow],
    *,
    oversample: int | None = None,
) -> dict[str, float] | None:
    """CMC-1 and recall@10 of probe queries of one model; None if no probe has its vector and relevant ids."""
    usable = [probe for probe in probes if model in probe.vectors and probe.relevant]
    if not usable:
        return None
    others = set.intersection(*(set(probe.vectors) for probe in usable)) - {model}
    request = SearchRequest(
        model=model,
        vectors=_stack(usable, model),
        companions={other: _stack(usable, other) for other in sorted(others)},
        k=RECALL_AT,
        oversample=oversample,
    )
    answer = searcher.search(world, gallery, request)
    first, recall = 0, 0.0
    for at, probe in enumerate(usable):
        relevant = set(probe.relevant or ())
        found = [hit.id for hit in answer.hits(at)]
        first += bool(found) and found[0] in relevant
        recall += len(relevant.intersection(found)) / min(RECALL_AT, len(relevant))
    return {"cmc1": first / len(usable), "recall_at_10": recall / len(usable), "probes": len(usable)}


def _report(store: Store, row: UpgradeRow) -> dict[str, Any]:
    """What the upgrade will take, measured.

    Raises:
        Damaged, UnsafeArtifact: the artifact is not the one that was registered.
        WrongTransformation: it does not give finite vectors of the target's dimension from this gallery's vectors.
        MissingSideInformation: items lack it and the policy is to fail.
        LimitExceeded: the disk has no room.
    """
    transformation = model_rows.as_transformation(row.transformation)
    with store.catalog.reading() as session:
        bare = item_rows.without_side(session, row.gallery_id or 0, row.target_id)
        items = sum(upgrade_rows.counts(session, row.id).items.values())
        itemsize = np.dtype(session.get_one(GalleryRow, row.gallery_id).storage_dtype).itemsize
    missing = bare if transformation.side_dimension is not None else 0
    if missing and row.missing_side == "fail":
        raise errors.MissingSideInformation(
            f"{missing} items have no side-information, which {transformation.name} needs: store it, or start the upgrade "
            "with on_missing_side_information `zeros` or `skip`"
        )
    rate = _probe_answer(store, row)
    needed = int(items * row.target.dimension * itemsize * _HEADROOM)
    free = shutil.disk_usage(store.files.root).free
    if needed > free:
        raise errors.LimitExceeded(f"the new columns need about {needed} bytes, and the disk has {free} free")
    return {
        "items": items,
        "items_without_side_information": missing,
        "bytes_needed": needed,
        "bytes_free": free,
        "estimated_seconds": items / rate if rate else None,
    }


def _probe_answer(store: Store, row: UpgradeRow) -> float | None:
    """Transform a sample of stored vectors and look at the result; items per second, null if there is nothing to sample."""
    with store.catalog.reading() as session:
        found = session.execute(
            select(ColumnRow.file, SegmentRow)
            .join(SegmentRow)
            .where(
                SegmentRow.gallery_id == row.gallery_id,
                SegmentRow.retired_at.is_(None),
                ColumnRow.model_id == row.source_id,
            )
            .order_by(SegmentRow.rows.desc())
            .limit(1)
        ).first()
    if found is None:
        return None
    file, segment = found
    sample = open_column(store.files.path(file), rows=segment.rows, dimension=row.source.dimension)[:_SAMPLE_ROWS]
    side = None
    if segment.side_file is not None and segment.side_dimension is not None:
        side = open_column(store.files.path(segment.side_file), rows=segment.rows, dimension=segment.side_dimension)
        side = side[:_SAMPLE_ROWS]
    started = time.perf_counter()
    try:
        mapped = store.transforms.apply(
            model_rows.as_transformation(row.transformation), model_rows.as_model(row.target), sample, side
        )
    except errors.GalleryError:
        raise
    except Exception as error:
        raise errors.WrongTransformation(
            f"{row.transformation.name} cannot map stored vectors of {row.source.name}: {error!r}"
        ) from error
    seconds = time.perf_counter() - started
    if mapped.shape != (len(sample), row.target.dimension) or not np.isfinite(mapped).all():
        raise errors.WrongTransformation(
            f"{row.transformation.name} gives no finite vectors of dimension {row.target.dimension} from stored vectors of "
            f"{row.source.name}"
        )
    return len(sample) / seconds


def _expect(store: Store, galleries: Galleries, searcher: Searcher, row: UpgradeRow) -> dict[str, Any]:
    with store.catalog.reading() as session:
        probes = upgrade_rows.probes(session, row.gallery_id or 0)
    if not probes:
        return {}
    world = galleries.refresh()
    before = measure(world, searcher, row.gallery_name, row.source.name, probes)
    try:
        after = measure(world, searcher, row.gallery_name, row.target.name, probes, oversample=100)
    except errors.NoRoute:
        after = None  # the probes have no source-model vectors, so candidates cannot be found before the upgrade
    return {"before": before, "now": after, "expected_after": after}


def _shortfall(gate: Mapping[str, float], quality: Mapping[str, Any]) -> str | None:
    """By how much the expected quality misses the gate, in words."""
    expected = quality.get("expected_after")
    for limit, measure_name in LIMITS.items():
        if limit not in gate:
            continue
        if expected is None:
            return f"the gate asks for {limit}, but there are no probes with relevant ids and vectors of both models"
        if expected[measure_name] < gate[limit]:
            return (
                f"the gate asks for {measure_name} of at least {gate[limit]:g}, and {expected[measure_name]:.4f} is expected "
                f"after the upgrade ({gate[limit] - expected[measure_name]:.4f} short)"
            )
    return None


def put_probes(
    session: Session, gallery_id: int, probes: Sequence[tuple[Mapping[str, Vectors], Sequence[str] | None]]
) -> None:
    """Replace a gallery's probes: per probe its vector in each model, and the relevant ids if known."""
    for row in upgrade_rows.probes(session, gallery_id):
        session.delete(row)
    session.flush()
    session.add_all(
        ProbeRow(
            gallery_id=gallery_id,
            position=at,
            vectors={
                name: base64.b64encode(vector.astype("<f4").tobytes()).decode() for name, vector in vectors.items()
            },
            relevant=list(relevant) if relevant is not None else None,
        )
        for at, (vectors, relevant) in enumerate(probes)
    )
    session.flush()


def _stack(probes: Sequence[ProbeRow], model: str) -> Vectors:
    return np.stack([np.frombuffer(base64.b64decode(probe.vectors[model]), dtype="<f4") for probe in probes])
