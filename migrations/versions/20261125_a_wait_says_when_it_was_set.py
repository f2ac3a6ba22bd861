"""An upgrade that is held back says when that was decided, so that a clock that is set back does not make it wait for hours.

Revision: 20261125, after 20261124
"""

import sqlalchemy as sa
from alembic import op

revision = "20261125"
down_revision = "20261124"
branch_labels = None
depends_on = None

# Not by batch, for the reason that 20261121 gives.


def upgrade() -> None:
    op.add_column("upgrades", sa.Column("not_before_set_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("upgrades", "not_before_set_at")
