"""A transformation can be fitted by a worker, from items of a gallery and their vectors by another model.

Revision: 20261124, after 20261123
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "20261124"
down_revision = "20261123"
branch_labels = None
depends_on = None

Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
Moment = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "fits",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("gallery_id", sa.Integer(), nullable=False),
        sa.Column("gallery_name", sa.String(length=63), nullable=False),
        sa.Column("source_id", sa.Integer(), nullable=False),
        sa.Column("target_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("method", sa.String(length=63), nullable=False),
        sa.Column("direction", sa.String(length=8), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("use_side", sa.Boolean(), nullable=True),
        sa.Column("pairs", sa.Integer(), nullable=False),
        sa.Column("ids_file", sa.String(), nullable=True),
        sa.Column("ids_sha256", sa.String(length=64), nullable=True),
        sa.Column("vectors_file", sa.String(), nullable=True),
        sa.Column("vectors_sha256", sa.String(length=64), nullable=True),
        sa.Column("labels_file", sa.String(), nullable=True),
        sa.Column("labels_sha256", sa.String(length=64), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("owner", sa.String(), nullable=True),
        sa.Column("leased_until", Moment, nullable=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("fraction", sa.Double(), nullable=False),
        sa.Column("trying", sa.String(length=63), nullable=True),
        sa.Column("report", Json, nullable=False),
        sa.Column("artifact", sa.String(length=64), nullable=True),
        sa.Column("idempotency_key", sa.String(), nullable=True),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("created_at", Moment, nullable=False),
        sa.Column("started_at", Moment, nullable=True),
        sa.Column("finished_at", Moment, nullable=True),
        sa.ForeignKeyConstraint(["source_id"], ["models.id"], name=op.f("fk_fits_source_id_models")),
        sa.ForeignKeyConstraint(["target_id"], ["models.id"], name=op.f("fk_fits_target_id_models")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fits")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_fits_idempotency_key")),
    )
    op.create_index(
        "fits_active",
        "fits",
        ["name"],
        unique=True,
        sqlite_where=sa.text("active"),
        postgresql_where=sa.text("active"),
    )


def downgrade() -> None:
    op.drop_index("fits_active", "fits", sqlite_where=sa.text("active"), postgresql_where=sa.text("active"))
    op.drop_table("fits")
