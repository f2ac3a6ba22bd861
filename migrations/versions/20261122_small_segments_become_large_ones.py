"""A segment can be retired by the larger one that took its rows over, and a gallery can be asked to compact.

Revision: 20261122, after 20261121
"""

import sqlalchemy as sa
from alembic import op

revision = "20261122"
down_revision = "20261121"
branch_labels = None
depends_on = None

# Not by batch, for the reason that 20261121 gives.


def upgrade() -> None:
    op.add_column("segments", sa.Column("retired_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("galleries", sa.Column("compact_asked_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("galleries", "compact_asked_at")
    op.drop_column("segments", "retired_at")
