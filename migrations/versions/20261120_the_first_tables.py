"""The first tables.

Revision: 20261120, after nothing
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "20261120"
down_revision = None
branch_labels = None
depends_on = None

Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("scope", sa.String(length=8), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("name", name=op.f("uq_api_keys_name")),
        sa.UniqueConstraint("sha256", name=op.f("uq_api_keys_sha256")),
    )
    op.create_table(
        "artifacts",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column(
            "architecture",
            Json,
            nullable=False,
        ),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_artifacts")),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(), nullable=True),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("gallery", sa.String(length=63), nullable=True),
        sa.Column("upgrade_id", sa.String(length=26), nullable=True),
        sa.Column(
            "detail",
            Json,
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_events_upgrade_id"), ["upgrade_id"], unique=False)

    op.create_table(
        "models",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("dimension", sa.Integer(), nullable=False),
        sa.Column("metric", sa.String(length=16), nullable=False),
        sa.Column("normalized", sa.Boolean(), nullable=False),
        sa.Column("side_dimension", sa.Integer(), nullable=True),
        sa.Column("fingerprint", sa.String(), nullable=True),
        sa.Column("description", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_models")),
        sa.UniqueConstraint("name", name=op.f("uq_models_name")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "search_latencies",
        sa.Column("process", sa.String(), nullable=False),
        sa.Column("gallery_id", sa.Integer(), nullable=False),
        sa.Column("p99_ms", sa.Double(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("process", "gallery_id", name=op.f("pk_search_latencies")),
    )
    op.create_table(
        "galleries",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column(
            "index",
            Json,
            nullable=False,
        ),
        sa.Column("storage_dtype", sa.String(length=8), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_galleries_model_id_models")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_galleries")),
        sa.UniqueConstraint("name", name=op.f("uq_galleries_name")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "transformations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("source_id", sa.Integer(), nullable=False),
        sa.Column("target_id", sa.Integer(), nullable=False),
        sa.Column("direction", sa.String(length=8), nullable=False),
        sa.Column("method", sa.String(length=63), nullable=False),
        sa.Column("artifact", sa.String(length=64), nullable=False),
        sa.Column("side_dimension", sa.Integer(), nullable=True),
        sa.Column(
            "evaluation",
            Json,
            nullable=True,
        ),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["artifact"], ["artifacts.sha256"], name=op.f("fk_transformations_artifact_artifacts")),
        sa.ForeignKeyConstraint(["source_id"], ["models.id"], name=op.f("fk_transformations_source_id_models")),
        sa.ForeignKeyConstraint(["target_id"], ["models.id"], name=op.f("fk_transformations_target_id_models")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_transformations")),
        sa.UniqueConstraint("name", name=op.f("uq_transformations_name")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "probes",
        sa.Column("gallery_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column(
            "vectors",
            Json,
            nullable=False,
        ),
        sa.Column(
            "relevant",
            Json,
            nullable=True,
        ),
        sa.ForeignKeyConstraint(["gallery_id"], ["galleries.id"], name=op.f("fk_probes_gallery_id_galleries")),
        sa.PrimaryKeyConstraint("gallery_id", "position", name=op.f("pk_probes")),
    )
    op.create_table(
        "segments",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("gallery_id", sa.Integer(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("ids_file", sa.String(), nullable=False),
        sa.Column("ids_sha256", sa.String(length=64), nullable=False),
        sa.Column("ids_bytes", sa.BigInteger(), nullable=False),
        sa.Column("side_file", sa.String(), nullable=True),
        sa.Column("side_sha256", sa.String(length=64), nullable=True),
        sa.Column("side_bytes", sa.BigInteger(), nullable=True),
        sa.Column("side_dimension", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["gallery_id"], ["galleries.id"], name=op.f("fk_segments_gallery_id_galleries")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_segments")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("segments", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_segments_gallery_id"), ["gallery_id"], unique=False)

    op.create_table(
        "upgrades",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("gallery_id", sa.Integer(), nullable=True),
        sa.Column("gallery_name", sa.String(length=63), nullable=False),
        sa.Column("source_id", sa.Integer(), nullable=False),
        sa.Column("target_id", sa.Integer(), nullable=False),
        sa.Column("transformation_id", sa.Integer(), nullable=False),
        sa.Column("artifact", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("state_since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("cutover", sa.String(length=16), nullable=False),
        sa.Column("order", sa.String(length=16), nullable=False),
        sa.Column("missing_side", sa.String(length=8), nullable=False),
        sa.Column("dry_run", sa.Boolean(), nullable=False),
        sa.Column(
            "throttle",
            Json,
            nullable=False,
        ),
        sa.Column(
            "gate",
            Json,
            nullable=False,
        ),
        sa.Column(
            "quality",
            Json,
            nullable=False,
        ),
        sa.Column(
            "report",
            Json,
            nullable=False,
        ),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=True),
        sa.Column("idempotency_key", sa.String(), nullable=True),
        sa.Column("request_sha256", sa.String(length=64), nullable=True),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["gallery_id"], ["galleries.id"], name=op.f("fk_upgrades_gallery_id_galleries")),
        sa.ForeignKeyConstraint(["source_id"], ["models.id"], name=op.f("fk_upgrades_source_id_models")),
        sa.ForeignKeyConstraint(["target_id"], ["models.id"], name=op.f("fk_upgrades_target_id_models")),
        sa.ForeignKeyConstraint(
            ["transformation_id"], ["transformations.id"], name=op.f("fk_upgrades_transformation_id_transformations")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upgrades")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_upgrades_idempotency_key")),
    )
    with op.batch_alter_table("upgrades", schema=None) as batch_op:
        batch_op.create_index(
            "upgrades_active",
            ["gallery_id"],
            unique=True,
            sqlite_where=sa.text("active"),
            postgresql_where=sa.text("active"),
        )

    op.create_table(
        "columns",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("segment_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("origin", sa.String(length=7), nullable=False),
        sa.Column("transformation_id", sa.Integer(), nullable=True),
        sa.Column("upgrade_id", sa.String(length=26), nullable=True),
        sa.Column("published", sa.Boolean(), nullable=False),
        sa.Column("dtype", sa.String(length=8), nullable=False),
        sa.Column("file", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("index_kind", sa.String(length=16), nullable=False),
        sa.Column(
            "index_parameters",
            Json,
            nullable=False,
        ),
        sa.Column("index_file", sa.String(), nullable=True),
        sa.Column("index_sha256", sa.String(length=64), nullable=True),
        sa.Column("index_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_columns_model_id_models")),
        sa.ForeignKeyConstraint(["segment_id"], ["segments.id"], name=op.f("fk_columns_segment_id_segments")),
        sa.ForeignKeyConstraint(
            ["transformation_id"], ["transformations.id"], name=op.f("fk_columns_transformation_id_transformations")
        ),
        sa.ForeignKeyConstraint(["upgrade_id"], ["upgrades.id"], name=op.f("fk_columns_upgrade_id_upgrades")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_columns")),
        sa.UniqueConstraint("segment_id", "model_id", name=op.f("uq_columns_segment_id")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("columns", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_columns_upgrade_id"), ["upgrade_id"], unique=False)

    op.create_table(
        "items",
        sa.Column(
            "segment_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False
        ),
        sa.Column("row", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("gallery_id", sa.Integer(), nullable=False),
        sa.Column("item_id", sa.String(), nullable=False),
        sa.Column(
            "payload",
            Json,
            nullable=True,
        ),
        sa.Column("deleted_version", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["segment_id"], ["segments.id"], name=op.f("fk_items_segment_id_segments")),
        sa.PrimaryKeyConstraint("segment_id", "row", name=op.f("pk_items")),
    )
    with op.batch_alter_table("items", schema=None) as batch_op:
        batch_op.create_index(
            "items_deleted",
            ["gallery_id", "deleted_version"],
            unique=False,
            sqlite_where=sa.text("deleted_version IS NOT NULL"),
            postgresql_where=sa.text("deleted_version IS NOT NULL"),
        )
        batch_op.create_index(
            "items_live",
            ["gallery_id", "item_id"],
            unique=True,
            sqlite_where=sa.text("deleted_version IS NULL"),
            postgresql_where=sa.text("deleted_version IS NULL"),
        )

    op.create_table(
        "upgrade_segments",
        sa.Column("upgrade_id", sa.String(length=26), nullable=False),
        sa.Column(
            "segment_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False
        ),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=8), nullable=False),
        sa.Column("owner", sa.String(), nullable=True),
        sa.Column("leased_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("done_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["segment_id"], ["segments.id"], name=op.f("fk_upgrade_segments_segment_id_segments")),
        sa.ForeignKeyConstraint(["upgrade_id"], ["upgrades.id"], name=op.f("fk_upgrade_segments_upgrade_id_upgrades")),
        sa.PrimaryKeyConstraint("upgrade_id", "segment_id", name=op.f("pk_upgrade_segments")),
    )


def downgrade() -> None:
    op.drop_table("upgrade_segments")
    with op.batch_alter_table("items", schema=None) as batch_op:
        batch_op.drop_index(
            "items_live",
            sqlite_where=sa.text("deleted_version IS NULL"),
            postgresql_where=sa.text("deleted_version IS NULL"),
        )
        batch_op.drop_index(
            "items_deleted",
            sqlite_where=sa.text("deleted_version IS NOT NULL"),
            postgresql_where=sa.text("deleted_version IS NOT NULL"),
        )

    op.drop_table("items")
    with op.batch_alter_table("columns", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_columns_upgrade_id"))

    op.drop_table("columns")
    with op.batch_alter_table("upgrades", schema=None) as batch_op:
        batch_op.drop_index("upgrades_active", sqlite_where=sa.text("active"), postgresql_where=sa.text("active"))

    op.drop_table("upgrades")
    with op.batch_alter_table("segments", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_segments_gallery_id"))

    op.drop_table("segments")
    op.drop_table("probes")
    op.drop_table("transformations")
    op.drop_table("galleries")
    op.drop_table("search_latencies")
    op.drop_table("models")
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_events_upgrade_id"))

    op.drop_table("events")
    op.drop_table("artifacts")
    op.drop_table("api_keys")
