"""A column says which transformations made it, step by step; an upgrade is pinned to as many as it needs.

Revision: 20261123, after 20261122
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "20261123"
down_revision = "20261122"
branch_labels = None
depends_on = None

Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")

# Not by batch, for the reason that 20261121 gives.


def upgrade() -> None:
    op.add_column("columns", sa.Column("lineage", Json, server_default="[]", nullable=False))
    op.add_column("upgrades", sa.Column("others", Json, server_default="[]", nullable=False))
    # Until now one transformation made a column. What its source was made by, if that was derived too, nobody noted down.
    connection = op.get_bind()
    known = connection.execute(
        sa.text(
            "SELECT transformations.id, transformations.name, artifact, models.name AS source FROM transformations"
            " JOIN models ON models.id = transformations.source_id"
        )
    )
    columns = sa.table("columns", sa.column("transformation_id", sa.Integer()), sa.column("lineage", Json))
    for row in known.all():
        step = {"transformation": row.name, "artifact": row.artifact, "source": row.source}
        op.execute(columns.update().where(columns.c.transformation_id == row.id).values(lineage=[step]))


def downgrade() -> None:
    op.drop_column("upgrades", "others")
    op.drop_column("columns", "lineage")
