"""Every table. Rows are facts; what to do about them is decided elsewhere.

Three constraints carry invariants by themselves: `items_live` makes it impossible that an id is live twice in a gallery,
`upgrades_active` that two upgrades of one gallery are active, and `fits_active` that two fits want the same name.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from gallery import faults
from gallery.arrays import Dtype, Metric, Origin
from gallery.spaces import Direction

Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
# SQLite counts only an INTEGER PRIMARY KEY up by itself.
BigId = BigInteger().with_variant(Integer, "sqlite")
# SQLite gives the id of a deleted last row to the next one, unless told otherwise. Snapshots and caches know segments,
# columns and galleries by their ids and would take the new one for the old.
NEVER_AGAIN = {"sqlite_autoincrement": True}
NAME_LENGTH = 63


class Utc(TypeDecorator[datetime]):
    """A moment in UTC. SQLite forgets time zones, so they are put back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Refuse moments without a zone; store the rest in UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a moment without a time zone cannot be stored")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Say that it is UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC) + faults.behind()


def rfc3339(moment: datetime) -> str:
    """A moment in UTC as JSON has it, which ends in Z."""
    return moment.isoformat().replace("+00:00", "Z")


class Base(DeclarativeBase):
    """Names of constraints are fixed, so that migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: Utc, dict[str, Any]: Json, list[Any]: Json}  # noqa: RUF012


class ModelRow(Base):
    """A registered embedding model."""

    __tablename__ = "models"
    __table_args__ = NEVER_AGAIN

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_LENGTH), unique=True)
    dimension: Mapped[int]
    metric: Mapped[Metric] = mapped_column(String(16))
    normalized: Mapped[bool]
    side_dimension: Mapped[int | None]
    fingerprint: Mapped[str | None]
    description: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=now)


class ArtifactRow(Base):
    """An uploaded safetensors file."""

    __tablename__ = "artifacts"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    architecture: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


class TransformationRow(Base):
    """A map between the spaces of two models; never changed once registered, but for its evaluation."""

    __tablename__ = "transformations"
    __table_args__ = NEVER_AGAIN

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_LENGTH), unique=True)
    source_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    target_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    direction: Mapped[Direction] = mapped_column(String(8))
    method: Mapped[str] = mapped_column(String(NAME_LENGTH))
    artifact: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"))
    side_dimension: Mapped[int | None]
    evaluation: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=now)

    source: Mapped[ModelRow] = relationship(foreign_keys=[source_id], lazy="joined", innerjoin=True)
    target: Mapped[ModelRow] = relationship(foreign_keys=[target_id], lazy="joined", innerjoin=True)


class GalleryRow(Base):
    """A searchable set of items. Every change of what a search can see advances `version`."""

    __tablename__ = "galleries"
    __table_args__ = NEVER_AGAIN

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_LENGTH), unique=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    index: Mapped[dict[str, Any]]
    storage_dtype: Mapped[Dtype] = mapped_column(String(8))
    version: Mapped[int] = mapped_column(BigInteger, default=0)
    #: when an operator asked for all small segments to be merged; null once that is done
    compact_asked_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=now)

    model: Mapped[ModelRow] = relationship(lazy="joined", innerjoin=True)


class SegmentRow(Base):
    """A fixed set of rows. Written once; its membership never changes.

    What does change: the counts of its hits and of its deleted rows, and that a larger segment takes its place.
    """

    __tablename__ = "segments"
    __table_args__ = NEVER_AGAIN

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    gallery_id: Mapped[int] = mapped_column(ForeignKey("galleries.id"), index=True)
    rows: Mapped[int]
    #: how many of its rows are deleted, so that nobody who only wants to know how many items there are reads a million marks
    dead: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column(BigInteger)
    ids_file: Mapped[str]
    ids_sha256: Mapped[str] = mapped_column(String(64))
    ids_bytes: Mapped[int] = mapped_column(BigInteger)
    side_file: Mapped[str | None]
    side_sha256: Mapped[str | None] = mapped_column(String(64))
    side_bytes: Mapped[int | None] = mapped_column(BigInteger)
    side_dimension: Mapped[int | None]
    #: what searches found in it, ever; API processes add to it, and the order of an upgrade may follow it
    hits: Mapped[int] = mapped_column(BigInteger, default=0)
    #: since when its live rows are in another segment (null: they are here); kept a while for searches that began before
    retired_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=now)

    @hybrid_property
    def live(self) -> int:
        """How many of its rows are live."""
        return self.rows - self.dead


class ColumnRow(Base):
    """One segment's vectors for one model. `published` columns are seen by searches; others wait for a cutover."""

    __tablename__ = "columns"
    __table_args__ = (UniqueConstraint("segment_id", "model_id"), NEVER_AGAIN)

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    segment_id: Mapped[int] = mapped_column(ForeignKey("segments.id"))
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    origin: Mapped[Origin] = mapped_column(String(7))
    transformation_id: Mapped[int | None] = mapped_column(ForeignKey("transformations.id"))
    upgrade_id: Mapped[str | None] = mapped_column(ForeignKey("upgrades.id"), index=True)
    #: every transformation since a model made the vectors (`gallery.lineage`); empty where the column is native
    lineage: Mapped[list[Any]] = mapped_column(default=list)
    published: Mapped[bool]
    dtype: Mapped[Dtype] = mapped_column(String(8))
    file: Mapped[str]
    sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    index_kind: Mapped[str] = mapped_column(String(16), default="flat")
    index_parameters: Mapped[dict[str, Any]] = mapped_column(default=dict)
    index_file: Mapped[str | None]
    index_sha256: Mapped[str | None] = mapped_column(String(64))
    index_bytes: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=now)


class ItemRow(Base):
    """One row of one segment: which item it holds, and since which gallery version it is deleted (null: live)."""

    __tablename__ = "items"
    __table_args__ = (
        Index(
            "items_live",
            "gallery_id",
            "item_id",
            unique=True,
            sqlite_where=text("deleted_version IS NULL"),
            postgresql_where=text("deleted_version IS NULL"),
        ),
        Index(
            "items_deleted",
            "gallery_id",
            "deleted_version",
            sqlite_where=text("deleted_version IS NOT NULL"),
            postgresql_where=text("deleted_version IS NOT NULL"),
        ),
    )

    segment_id: Mapped[int] = mapped_column(ForeignKey("segments.id"), primary_key=True, autoincrement=False)
    row: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    gallery_id: Mapped[int]
    item_id: Mapped[str]
    payload: Mapped[dict[str, Any] | None]
    deleted_version: Mapped[int | None] = mapped_column(BigInteger)


class UpgradeRow(Base):
    """One run that gives every segment of a gallery a column of the target model."""

    __tablename__ = "upgrades"
    __table_args__ = (
        Index(
            "upgrades_active",
            "gallery_id",
            unique=True,
            sqlite_where=text("active = 1"),  # as in what SQLAlchemy writes, or SQLite would not use it
            postgresql_where=text("active"),
        ),
    )

    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    #: null once the gallery is deleted; the run stays as history
    gallery_id: Mapped[int | None] = mapped_column(ForeignKey("galleries.id"), index=True)
    gallery_name: Mapped[str] = mapped_column(String(NAME_LENGTH))
    source_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    target_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    transformation_id: Mapped[int] = mapped_column(ForeignKey("transformations.id"))
    artifact: Mapped[str] = mapped_column(String(64))
    #: what else it is pinned to, for segments with columns of other models: {"transformation", "artifact"}
    others: Mapped[list[Any]] = mapped_column(default=list)
    state: Mapped[str] = mapped_column(String(16))
    state_since: Mapped[datetime] = mapped_column(default=now)
    active: Mapped[bool]
    cutover: Mapped[str] = mapped_column(String(16))
    order: Mapped[str] = mapped_column(String(16))
    missing_side: Mapped[str] = mapped_column(String(8))
    #: whether items that the target model embedded again may refuse it
    contradicting: Mapped[str] = mapped_column(String(8), default="fail")
    dry_run: Mapped[bool]
    #: the worker that has, or had, the lease on the upgrade itself, to check or to verify it; and when that lease ends
    owner: Mapped[str | None]
    leased_until: Mapped[datetime | None]
    throttle: Mapped[dict[str, Any]]
    gate: Mapped[dict[str, Any]]
    quality: Mapped[dict[str, Any]]
    report: Mapped[dict[str, Any]]
    #: no segment may be leased before this moment; how the throttle reaches every worker
    not_before: Mapped[datetime | None]
    #: when that was set, by which it is noticed that a clock was set back
    not_before_set_at: Mapped[datetime | None]
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    request_sha256: Mapped[str | None] = mapped_column(String(64))
    error: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    #: only grows, unlike the rows of work, which go with merged segments and with the gallery
    items_transformed: Mapped[int] = mapped_column(BigInteger, default=0)
    #: the counts of `gallery.upgrade.progress` when it ended, kept for the same reason; null before
    progress: Mapped[dict[str, Any] | None]

    source: Mapped[ModelRow] = relationship(foreign_keys=[source_id], lazy="joined", innerjoin=True)
    target: Mapped[ModelRow] = relationship(foreign_keys=[target_id], lazy="joined", innerjoin=True)
    transformation: Mapped[TransformationRow] = relationship(lazy="joined", innerjoin=True)


class UpgradeSegmentRow(Base):
    """The unit of work of an upgrade, with its lease. `fence` grows with each lease; only its latest holder may publish."""

    __tablename__ = "upgrade_segments"

    upgrade_id: Mapped[str] = mapped_column(ForeignKey("upgrades.id"), primary_key=True)
    segment_id: Mapped[int] = mapped_column(
        ForeignKey("segments.id"), primary_key=True, autoincrement=False, index=True
    )
    position: Mapped[int] = mapped_column(BigInteger)
    rows: Mapped[int]
    state: Mapped[str] = mapped_column(String(8), default="pending")
    owner: Mapped[str | None]
    leased_until: Mapped[datetime | None]
    fence: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    error: Mapped[str | None]
    done_at: Mapped[datetime | None]


class FitRow(Base):
    """One training of a transformation, from items of a gallery and what the target model makes of them."""

    __tablename__ = "fits"
    __table_args__ = (
        Index("fits_active", "name", unique=True, sqlite_where=text("active"), postgresql_where=text("active")),
    )

    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    #: no foreign key: the gallery may be deleted while the fit waits, and then the fit fails by itself
    gallery_id: Mapped[int]
    gallery_name: Mapped[str] = mapped_column(String(NAME_LENGTH))
    source_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    target_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    #: the transformation that it will register; no two active fits want the same one
    name: Mapped[str] = mapped_column(String(NAME_LENGTH))
    method: Mapped[str] = mapped_column(String(NAME_LENGTH))
    direction: Mapped[Direction] = mapped_column(String(8))
    seed: Mapped[int] = mapped_column(BigInteger)
    #: whether the items' side-information is fitted too; null: if all of them have it
    use_side: Mapped[bool | None]
    #: the pairs: their number, and until the fit ends their files
    pairs: Mapped[int]
    ids_file: Mapped[str | None]
    ids_sha256: Mapped[str | None] = mapped_column(String(64))
    vectors_file: Mapped[str | None]
    vectors_sha256: Mapped[str | None] = mapped_column(String(64))
    labels_file: Mapped[str | None]
    labels_sha256: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16), default="pending")
    active: Mapped[bool] = mapped_column(default=True)
    owner: Mapped[str | None]
    leased_until: Mapped[datetime | None]
    fence: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    fraction: Mapped[float] = mapped_column(default=0.0)
    #: the method that is being trained
    trying: Mapped[str | None] = mapped_column(String(NAME_LENGTH))
    report: Mapped[dict[str, Any]] = mapped_column(default=dict)
    #: SHA-256 of what it made
    artifact: Mapped[str | None] = mapped_column(String(64))
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    error: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    source: Mapped[ModelRow] = relationship(foreign_keys=[source_id], lazy="joined", innerjoin=True)
    target: Mapped[ModelRow] = relationship(foreign_keys=[target_id], lazy="joined", innerjoin=True)


class EventRow(Base):
    """What happened, for people who ask later: who, what, with which artifact."""

    __tablename__ = "events"
    __table_args__ = NEVER_AGAIN

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    at: Mapped[datetime] = mapped_column(default=now)
    actor: Mapped[str | None]
    action: Mapped[str] = mapped_column(String(64))
    gallery: Mapped[str | None] = mapped_column(String(NAME_LENGTH), index=True)
    upgrade_id: Mapped[str | None] = mapped_column(String(26), index=True)
    detail: Mapped[dict[str, Any]]


class ProbeRow(Base):
    """A query with known vectors, to measure a gallery's quality with."""

    __tablename__ = "probes"

    gallery_id: Mapped[int] = mapped_column(ForeignKey("galleries.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    #: model name -> base64 of little-endian float32
    vectors: Mapped[dict[str, Any]]
    relevant: Mapped[list[Any] | None]


class SearchLatencyRow(Base):
    """How slow searches are at one API process; what holds an upgrade back."""

    __tablename__ = "search_latencies"

    process: Mapped[str] = mapped_column(primary_key=True)
    gallery_id: Mapped[int] = mapped_column(primary_key=True)
    p99_ms: Mapped[float]
    at: Mapped[datetime]


class KeyRow(Base):
    """An API key; the key itself is shown once and never stored."""

    __tablename__ = "api_keys"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_LENGTH), unique=True)
    scope: Mapped[str] = mapped_column(String(8))
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime] = mapped_column(default=now)
    revoked_at: Mapped[datetime | None]


class IdentityRow(Base):
    """Which catalog this is, in the one row that its migration made."""

    __tablename__ = "identity"

    id: Mapped[str] = mapped_column(String(26), primary_key=True)
