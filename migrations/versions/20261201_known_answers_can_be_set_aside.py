"""An upgrade says what becomes of items that contradict its transformation: until now, it always failed.

Revision: 20261201, after 20261130
"""

import sqlalchemy as sa
from alembic import op

revision = "20261201"
down_revision = "20261130"
branch_labels = None
depends_on = None

# Not by batch, for the reason that 20261121 gives.


def upgrade() -> None:
    op.add_column("upgrades", sa.Column("contradicting", sa.String(length=8), nullable=False, server_default="fail"))


def downgrade() -> None:
    op.drop_column("upgrades", "contradicting")
