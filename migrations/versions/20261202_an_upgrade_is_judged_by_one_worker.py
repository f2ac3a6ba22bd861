"""Who checks or verifies an upgrade holds it meanwhile: until now, every worker did all of it.

Revision: 20261202, after 20261201
"""

import sqlalchemy as sa
from alembic import op

revision = "20261202"
down_revision = "20261201"
branch_labels = None
depends_on = None

# Not by batch, for the reason that 20261121 gives.


def upgrade() -> None:
    op.add_column("upgrades", sa.Column("owner", sa.String(), nullable=True))
    op.add_column("upgrades", sa.Column("leased_until", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("upgrades", "leased_until")
    op.drop_column("upgrades", "owner")
