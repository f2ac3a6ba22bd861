"""Does a transformation map this gallery's vectors where the target model puts them? Asked before the first write.

A map that is applied the wrong way round, or to another model's vectors of the same width, gives finite vectors of the
right dimension: nothing but a known answer tells it from the right one. Answers are known where the same thing was embedded
by both models: probes, items that were embedded again natively, and the sample of an evaluation. An item may also have come
again because it changed, and then its vectors tell nothing. Only a person knows that, and may have such items ignored.

The right map puts a vector nearer to its own answer than to those of others, is no worse than doing nothing, and does not
map the answers to the vectors instead. Where lengths count it gives vectors about as long as the answers: one that was fitted for
cosine, or in another unit, gives such that beside native items are found always or never.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session, aliased

from gallery import errors
from gallery.arrays import Metric, Vectors
from gallery.catalog import models as model_rows
from gallery.catalog.tables import ColumnRow, ItemRow, ModelRow, ProbeRow, SegmentRow, UpgradeRow
from gallery.columns import open_column
from gallery.index.scores import unit
from gallery.spaces import EmbeddingModel, Transformation
from gallery.store import Store
from gallery.upgrade import quality

#: fewer pairs than this are told, and not judged
FEWEST = 16
#: fewer than this cannot tell whether side-information belongs to the items, which matters less than the embedding
FEWEST_FOR_SIDE = 64
_MOST = 1024
# Standard errors that a difference must exceed, or it may be chance. Two unrelated maps are not quite unrelated in few
# dimensions, so three; side-information may make a small difference and still be the right one, so two.
_ERRORS, _ERRORS_FOR_SIDE = 3.0, 2.0
_SHARE = 0.1  # of the way from the answers of others to one's own; chance goes less far, however many pairs there are
_SAME = 1e-6  # differences of cosines that float32 makes
# A vector so many times as long as its answer, or as short, is none. Least squares make them as short as their cosine is low.
_TIMES = 5.0
_IF_CHANGED = (
    " Or had these items changed when they came again? Then cancel this upgrade, and start one with "
    "`on_contradicting_items`: `ignore`"
)


#: (n,) of n pairs
Cosines = NDArray[np.float64]


class Between(NamedTuple):
    """A transformation that an upgrade is pinned to, with the models at its ends."""

    transformation: Transformation
    source: ModelRow
    target: ModelRow


class Pairs(NamedTuple):
    """The same things embedded by both models."""

    #: where they are from, for people
    origin: str
    source: Vectors
    target: Vectors
    side: Vectors | None
    #: whether they are queries: by the inner product these may have any length, as it changes no order
    queries: bool = False


class Tried(NamedTuple):
    """What a transformation makes of pairs."""

    #: (n, target dimension), of the source vectors
    mapped: Vectors
    #: (n, target dimension), of the source vectors with the side-information of other items, if it takes any
    by_others_side: Vectors | None = None
    #: (n, source dimension), of the target vectors, where both dimensions agree
    back: Vectors | None = None


def compared(tried: Tried, source: Vectors, target: Vectors, *, metric: Metric) -> dict[str, Any]:
    """How near mapped vectors are to their known answers, beside what would be as near by chance. Pure.

    Args:
        tried: what the transformation makes of them.
        source: (n, source dimension).
        target: (n, target dimension), the known answers.
        metric: by which answers are compared.

    Returns:
        Number of `pairs`; `mean_cosine` of a vector and its answer, and of a vector and the answers of others as
        `mean_cosine_of_others`; where the dimensions agree `mean_cosine_unmapped`, and `mean_cosine_reversed` of answers
        that are mapped and the vectors; `mean_cosine_with_others_side`; null where there is none. `wrong` is why this
        cannot be the right transformation, or null.
    """
    h, y = _unit(tried.mapped), _unit(target)
    own = _cosines(h, y)
    others = (h @ y.sum(axis=0) - own) / max(1, len(h) - 1)
    rivals: dict[str, Cosines | None] = {
        "unmapped": _cosines(_unit(source), y) if source.shape == target.shape else None,
        "reversed": None if tried.back is None else _cosines(_unit(tried.back), _unit(source)),
        "with_others_side": None if tried.by_others_side is None else _cosines(_unit(tried.by_others_side), y),
    }
    lengths = None if metric == "cosine" else (_mean_length(tried.mapped), _mean_length(target))
    return {
        "pairs": len(h),
        "mean_cosine": float(own.mean()),
        "mean_cosine_of_others": float(others.mean()),
        **{f"mean_cosine_{name}": None if each is None else float(each.mean()) for name, each in rivals.items()},
        "wrong": next(_reasons(own, others, rivals, lengths), None) if len(own) >= FEWEST else None,
    }


def check(store: Store, row: UpgradeRow, used: Sequence[Transformation]) -> tuple[dict[str, Any], str]:
    """Try the transformations of an upgrade on every known answer there is.

    Args:
        store: where they are.
        row: the upgrade.
        used: those that its columns will be made by, all of which are pinned.

    Returns:
        What was found, for the report, and in words.

    Raises:
        WrongTransformation: one is not the right one by some of them.
    """
    told: list[dict[str, Any]] = []
    for transformation in used:
        told += _answered(store, row, transformation)
    wrong: dict[str, list[str]] = {}
    for each in told:
        if each["wrong"]:
            wrong.setdefault(each["transformation"], []).append(
                f"{each['wrong']} ({each['pairs']} pairs: {each['from']})"
            )
    if wrong:
        by_items = any(each["wrong"] and each["from"] == _again(row.target.name) for each in told)
        ends = {each.name: f"{each.source} to {each.target}" for each in used}
        raise errors.WrongTransformation(
            "; ".join(f"{name} does not map {ends[name]}: {'; '.join(reasons)}" for name, reasons in wrong.items())
            + f"; are source and target exchanged, or is it that of other models?{_IF_CHANGED if by_items else ''}",
            known_answers=told,
        )
    return {"known_answers": told}, _in_words(used, told)


def _answered(store: Store, row: UpgradeRow, transformation: Transformation) -> list[dict[str, Any]]:
    """What one makes of each sample of known answers."""
    with store.catalog.reading() as session:
        ends = (model_rows.model_row(session, name) for name in (transformation.source, transformation.target))
        way = Between(transformation, *ends)
        samples = [
            *(_embedded_again(store, session, row, way) if row.contradicting == "fail" else []),
            *_of_probes(quality.stored(session, row), transformation),
        ]
        target = model_rows.as_model(way.target)
    told = [{"from": each.origin, **_tried(store, transformation, target, each)} for each in samples]
    evaluated = (transformation.evaluation or {}).get("known_answers")
    if evaluated is not None:
        told.append({"from": "the sample that the transformation was evaluated with", **evaluated})
    return [{"transformation": transformation.name, **each} for each in told]


def _in_words(used: Sequence[Transformation], told: Sequence[dict[str, Any]]) -> str:
    return "; ".join(_of_one(each, [one for one in told if one["transformation"] == each.name]) for each in used)


def _of_one(transformation: Transformation, told: Sequence[dict[str, Any]]) -> str:
    judged = [each for each in told if each["pairs"] >= FEWEST]
    if judged:
        means = ", ".join(
            f"{each['mean_cosine']:.3f} (by chance {each['mean_cosine_of_others']:.3f})" for each in judged
        )
        return f"mean cosine of a vector that {transformation.name} maps and its known answer: {means}"
    return (
        f"{transformation.name} not checked: fewer than {FEWEST} answers are known; probes with vectors of "
        f"{transformation.source} and {transformation.target}, or an evaluation of the transformation, would tell"
    )


def _tried(store: Store, transformation: Transformation, target: EmbeddingModel, sample: Pairs) -> dict[str, Any]:
    def mapped(vectors: Vectors, side: Vectors | None) -> Vectors:
        return store.transforms.apply(transformation, target, vectors, side)

    own, strange = mapped(sample.source, sample.side), None
    if not np.isfinite(own).all():
        raise errors.WrongTransformation(f"{transformation.name} gives no finite vectors from {sample.origin}")
    if sample.side is not None and len(sample.side) >= FEWEST_FOR_SIDE:
        strange = mapped(sample.source, np.roll(sample.side, 1, axis=0))
    back = mapped(sample.target, sample.side) if sample.source.shape == sample.target.shape else None
    metric: Metric = "cosine" if sample.queries and target.metric == "inner_product" else target.metric
    return compared(Tried(own, strange, back), sample.source, sample.target, metric=metric)


def _reasons(
    own: Cosines, others: Cosines, rivals: Mapping[str, Cosines | None], lengths: tuple[float, float] | None
) -> Iterator[str]:
    """Why the transformation cannot be the right one, the most telling first, with the numbers that say so."""
    mine = own.mean()
    if not _exceeds(own, others) or mine - others.mean() < _SHARE * (1 - others.mean()):
        yield (
            f"its vectors are no nearer to their own answers ({mine:.3f}) than to those of others ({others.mean():.3f}), by "
            "more than chance"
        )
    strange = rivals["with_others_side"]
    # A map that makes nothing of side-information claims nothing of it.
    used = strange is not None and not np.allclose(own, strange, rtol=0, atol=_SAME)
    if strange is not None and used and not _exceeds(own, strange, errors=_ERRORS_FOR_SIDE):
        yield (
            f"the side-information of other items serves as well ({strange.mean():.3f}) as their own ({mine:.3f}): it is not "
            "of these items, or not of the kind that the transformation was trained with"
        )
    back, unmapped = rivals["reversed"], rivals["unmapped"]
    if back is not None and _exceeds(back, own):
        yield f"it maps the answers to the vectors ({back.mean():.3f}) better than these to those ({mine:.3f})"
    if unmapped is not None and _exceeds(unmapped, own):
        yield f"vectors are nearer to their answers without it ({unmapped.mean():.3f}) than with it ({mine:.3f})"
    if lengths is not None and not mine / _TIMES <= lengths[0] / max(lengths[1], _SAME) <= _TIMES:
        yield (
            f"its vectors have a length of {lengths[0]:.3g} where their answers have {lengths[1]:.3g}: it is for another "
            "unit, or for cosine"
        )


def _exceeds(one: Cosines, other: Cosines, errors: float = _ERRORS) -> bool:
    """Whether one is larger in the mean, by more than chance."""
    apart = one - other
    return bool(apart.mean() > max(_SAME, errors * float(apart.std(ddof=1)) / math.sqrt(len(apart))))


def _cosines(one: NDArray[np.float64], other: NDArray[np.float64]) -> Cosines:
    cosines: Cosines = np.einsum("nd,nd->n", one, other)
    return cosines


def _mean_length(vectors: Vectors) -> float:
    return float(np.linalg.norm(vectors.astype(np.float64), axis=1).mean())


def _unit(vectors: Vectors) -> NDArray[np.float64]:
    return unit(vectors).astype(np.float64)


def _of_probes(probes: Sequence[ProbeRow], transformation: Transformation) -> list[Pairs]:
    """Queries have no side-information, so they say nothing of a transformation that needs it."""
    found = quality.pairs(probes, transformation.source, transformation.target)
    if found is None or transformation.side_dimension is not None:
        return []
    return [Pairs("the gallery's probes", found[0][:_MOST], found[1][:_MOST], None, queries=True)]


def _embedded_again(store: Store, session: Session, row: UpgradeRow, way: Between) -> list[Pairs]:
    """Items that came again in the target model: the row that they were in before still has the source model's vector."""
    places = _places_of_both(session, row, way)
    needed = way.transformation.side_dimension
    with_side = {each.id: each for each in _segments(session, {place[0] for place in places}) if each.side_file}
    if needed is not None:
        places = [place for place in places if place[0] in with_side and with_side[place[0]].side_dimension == needed]
    if not places:
        return []
    old, new = [place[:2] for place in places], [place[2:] for place in places]
    side = None
    if needed is not None:
        files = {key: (each.side_file or "", each.rows) for key, each in with_side.items()}
        side = _taken(store, files, old, needed)
    return [
        Pairs(
            _again(way.target.name),
            _taken(store, _column_files(session, old, way.source.id), old, way.source.dimension),
            _taken(store, _column_files(session, new, way.target.id), new, way.target.dimension),
            side,
        )
    ]


def _places_of_both(session: Session, row: UpgradeRow, way: Between) -> Sequence[tuple[int, int, int, int]]:
    """Where items lie that came again in the target model: segment and row in the source model, then in the target model.

    In the source model the last row counts, if there are several: what an item was before that may have been something else.
    """
    target = list(session.scalars(_native(row, way.target.id)))
    if not target:
        return []  # as in nearly every gallery, and then the join below is not made
    was, became = aliased(ItemRow), aliased(ItemRow)
    latest = func.row_number().over(partition_by=was.item_id, order_by=was.deleted_version.desc())
    rows = (
        select(
            was.segment_id.label("segment"),
            was.row.label("row"),
            became.segment_id.label("new_segment"),
            became.row.label("new_row"),
            latest.label("age"),
        )
        .join(
            became,
            and_(became.gallery_id == was.gallery_id, became.item_id == was.item_id, became.deleted_version.is_(None)),
        )
        .where(
            was.gallery_id == row.gallery_id,
            was.deleted_version.is_not(None),
            was.segment_id.in_(_native(row, way.source.id)),
            became.segment_id.in_(target),
        )
        .subquery()
    )
    found = session.execute(
        select(rows.c.segment, rows.c.row, rows.c.new_segment, rows.c.new_row)
        .where(rows.c.age == 1)
        .order_by(rows.c.segment, rows.c.row)
        .limit(_MOST)
    )
    return [(segment, at, new_segment, new_at) for segment, at, new_segment, new_at in found]


def _again(target: str) -> str:
    return f"items that {target} embedded again"


def _native(row: UpgradeRow, model_id: int) -> Any:
    return (
        select(ColumnRow.segment_id)
        .join(SegmentRow)
        .where(
            SegmentRow.gallery_id == row.gallery_id,
            SegmentRow.retired_at.is_(None),
            ColumnRow.model_id == model_id,
            ColumnRow.origin == "native",
        )
    )


def _segments(session: Session, ids: set[int]) -> list[SegmentRow]:
    return list(session.scalars(select(SegmentRow).where(SegmentRow.id.in_(ids))))


def _column_files(session: Session, places: Sequence[Any], model_id: int) -> dict[int, tuple[str, int]]:
    found = session.execute(
        select(ColumnRow.segment_id, ColumnRow.file, SegmentRow.rows)
        .join(SegmentRow)
        .where(ColumnRow.segment_id.in_({place[0] for place in places}), ColumnRow.model_id == model_id)
    )
    return {segment: (file, rows) for segment, file, rows in found}


def _taken(store: Store, files: dict[int, tuple[str, int]], places: Sequence[Any], dimension: int) -> Vectors:
    """The rows at (segment, row) places: (places, dimension) float32."""
    taken = np.empty((len(places), dimension), np.float32)
    for segment, (file, rows) in files.items():
        at = [n for n, place in enumerate(places) if place[0] == segment]
        if not at:
            continue
        column = open_column(store.files.path(file), rows=rows, dimension=dimension)
        taken[at] = column[[places[n][1] for n in at]]
    return taken
