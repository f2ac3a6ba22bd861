"""An upgrade that is over keeps how far it came: what was counted from its rows shrank when segments were merged or deleted.

Of those that are over already, it is counted from the rows that are left, as before.

Revision: 20261130, after 20261129
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")

revision = "20261130"
down_revision = "20261129"
branch_labels = None
depends_on = None

# Not by batch, for the reason that 20261121 gives.


def upgrade() -> None:
    op.add_column("upgrades", sa.Column("progress", Json, nullable=True))


def downgrade() -> None:
    op.drop_column("upgrades", "progress")
