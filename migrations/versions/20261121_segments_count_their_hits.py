"""Segments count their hits, which the order of an upgrade may follow.

Revision: 20261121, after 20261120
"""

import sqlalchemy as sa
from alembic import op

revision = "20261121"
down_revision = "20261120"
branch_labels = None
depends_on = None

# Not by batch: that would copy the table, and SQLite refuses to drop one that columns and items refer to.


def upgrade() -> None:
    op.add_column("segments", sa.Column("hits", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("segments", "hits")
