"""Rows of models, artifacts and transformations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from gallery import errors
from gallery.arrays import Metric
from gallery.catalog.tables import ArtifactRow, ModelRow, TransformationRow
from gallery.spaces import Direction, EmbeddingModel, Registry, Transformation


@dataclass(frozen=True, slots=True)
class NewModel:
    """The definition of a model, as it is registered."""

    name: str
    dimension: int
    metric: Metric
    normalized: bool = False
    side_dimension: int | None = None
    fingerprint: str | None = None
    description: str | None = None


@dataclass(frozen=True, slots=True)
class NewTransformation:
    """The definition of a transformation, as it is registered."""

    name: str
    source: str
    target: str
    direction: Direction
    method: str
    artifact: str


def model_row(session: Session, name: str, *, pointer: str | None = None) -> ModelRow:
    """The row of a model; `pointer` says where in a request its name stands.

    Raises:
        ModelNotFound: no model has the name.
    """
    row = session.scalar(select(ModelRow).where(ModelRow.name == name))
    if row is None:
        raise errors.ModelNotFound(
            f"no model is registered as {name!r}; register it with POST /models", pointer=pointer
        )
    return row


def add_model(session: Session, new: NewModel) -> bool:
    """Register a model; False if this very definition is there already.

    Raises:
        ModelExists: another definition is registered under the name.
    """
    row = session.scalar(select(ModelRow).where(ModelRow.name == new.name))
    if row is None:
        session.add(
            ModelRow(
                name=new.name,
                dimension=new.dimension,
                metric=new.metric,
                normalized=new.normalized,
                side_dimension=new.side_dimension,
                fingerprint=new.fingerprint,
                description=new.description,
            )
        )
        session.flush()
        return True
    if differing := _differing(as_model(row), new):
        raise errors.ModelExists(
            f"model {new.name!r} is registered with another {differing}; a changed model needs a new name",
            pointer="/name",
        )
    return False


def artifact_row(session: Session, sha256: str) -> ArtifactRow:
    """The row of an artifact.

    Raises:
        ArtifactNotFound: it was not uploaded.
    """
    row = session.get(ArtifactRow, sha256)
    if row is None:
        raise errors.ArtifactNotFound(
            f"no artifact {sha256} was uploaded; send it with PUT /artifacts/{sha256}", pointer="/artifact"
        )
    return row


def add_artifact(session: Session, sha256: str, *, size: int, architecture: Mapping[str, Any]) -> bool:
    """Record an artifact whose file is durable; False if it was there already.

    Args:
        session: of a transaction.
        sha256: its digest.
        size: its bytes.
        architecture: as declared, with `source_dimension`, `target_dimension` and, where it needs any, `side_dimension`.
    """
    if session.get(ArtifactRow, sha256) is not None:
        return False
    session.add(ArtifactRow(sha256=sha256, bytes=size, architecture=dict(architecture)))
    session.flush()
    return True


def transformation_row(session: Session, name: str, *, pointer: str | None = None) -> TransformationRow:
    """The row of a transformation; `pointer` says where in a request its name stands.

    Raises:
        TransformationNotFound: none has the name.
    """
    row = session.scalar(select(TransformationRow).where(TransformationRow.name == name))
    if row is None:
        raise errors.TransformationNotFound(
            f"no transformation is registered as {name!r}; register it with POST /transformations", pointer=pointer
        )
    return row


def add_transformation(session: Session, new: NewTransformation) -> bool:
    """Register a transformation; False if this very definition is there already.

    Raises:
        TransformationExists: another definition is registered under the name.
        WrongTransformation: its artifact does not map between these two models.
    """
    source, target = (
        model_row(session, new.source, pointer="/source"),
        model_row(session, new.target, pointer="/target"),
    )
    artifact = artifact_row(session, new.artifact)
    row = session.scalar(select(TransformationRow).where(TransformationRow.name == new.name))
    if row is not None:
        return _same(row, new)
    side = _fits(artifact, source, target)
    if side is not None and new.direction == "backward":
        raise errors.WrongTransformation(
            "a backward transformation maps queries, which have no side-information; this artifact needs it",
            pointer="/direction",
        )
    session.add(
        TransformationRow(
            name=new.name,
            source_id=source.id,
            target_id=target.id,
            direction=new.direction,
            method=new.method,
            artifact=new.artifact,
            side_dimension=side,
        )
    )
    session.flush()
    return True


def registry(session: Session) -> Registry:
    """All models and transformations."""
    models = {row.name: as_model(row) for row in session.scalars(select(ModelRow).order_by(ModelRow.id))}
    rows = session.scalars(select(TransformationRow).order_by(TransformationRow.id))
    return Registry(models=models, transformations=tuple(as_transformation(row) for row in rows))


def registry_mark(session: Session) -> tuple[int, int]:
    """Changes whenever a model or a transformation is added; both are never changed or removed.

    Their number, not the largest id: of two that are added at once, the one with the smaller id may be committed last.
    """
    models, transformations = session.execute(
        select(
            select(func.count(ModelRow.id)).scalar_subquery(),
            select(func.count(TransformationRow.id)).scalar_subquery(),
        )
    ).one()
    return models, transformations


def transformations_of(session: Session, models: Sequence[int]) -> dict[int, list[str]]:
    """By model, the names of the transformations from or to it."""
    row, found = TransformationRow, {model: list[str]() for model in models}
    either = or_(row.source_id.in_(models), row.target_id.in_(models))
    for name, *ends in session.execute(select(row.name, row.source_id, row.target_id).where(either).order_by(row.name)):
        for model in found.keys() & ends:
            found[model].append(name)
    return found


def as_model(row: ModelRow) -> EmbeddingModel:
    """The value of a row."""
    return EmbeddingModel(
        id=row.id,
        name=row.name,
        dimension=row.dimension,
        metric=row.metric,
        normalized=row.normalized,
        side_dimension=row.side_dimension,
        fingerprint=row.fingerprint,
        description=row.description,
        created_at=row.created_at,
    )


def as_transformation(row: TransformationRow) -> Transformation:
    """The value of a row."""
    return Transformation(
        id=row.id,
        name=row.name,
        source=row.source.name,
        target=row.target.name,
        direction=row.direction,
        method=row.method,
        artifact=row.artifact,
        side_dimension=row.side_dimension,
        evaluation=row.evaluation,
        created_at=row.created_at,
    )


def _same(row: TransformationRow, new: NewTransformation) -> bool:
    if differing := _differing(as_transformation(row), new):
        raise errors.TransformationExists(
            f"transformation {new.name!r} is registered with another {differing}; choose a new name", pointer="/name"
        )
    return False


def _differing(known: EmbeddingModel | Transformation, new: NewModel | NewTransformation) -> str:
    """The fields of a definition in which what is registered differs, all of them looked at; empty if it is the same."""
    names = [each.name for each in fields(new) if getattr(known, each.name) != getattr(new, each.name)]
    return ", ".join("side_information" if name == "side_dimension" else name for name in names)


def _fits(artifact: ArtifactRow, source: ModelRow, target: ModelRow) -> int | None:
    """The width of the side-information that the artifact needs, if it maps from source to target at all."""
    declared = artifact.architecture
    if source.id == target.id:
        raise errors.WrongTransformation("source and target are the same model", pointer="/target")
    for end, model in (("source", source), ("target", target)):
        if declared[f"{end}_dimension"] != model.dimension:
            raise errors.WrongTransformation(
                f"the artifact's {end}_dimension is {declared[f'{end}_dimension']}, but {model.name} has dimension "
                f"{model.dimension}; are source and target exchanged?",
                pointer=f"/{end}",
            )
    side: int | None = declared.get("side_dimension")
    if side is not None and side != source.side_dimension:
        raise errors.WrongTransformation(
            f"the artifact needs side-information of dimension {side}, but {source.name} has {source.side_dimension}",
            pointer="/artifact",
        )
    return side
