"""An upgrade counts the items that it transformed: a counter that was summed over rows fell when segments were merged.

Revision: 20261129, after 20261125
"""

import sqlalchemy as sa
from alembic import op

revision = "20261129"
down_revision = "20261125"
branch_labels = None
depends_on = None

# Not by batch, for the reason that 20261121 gives.


def upgrade() -> None:
    op.add_column("upgrades", sa.Column("items_transformed", sa.BigInteger, nullable=False, server_default="0"))
    op.execute(
        "UPDATE upgrades SET items_transformed = coalesce((SELECT sum(work.rows) FROM upgrade_segments AS work "
        "WHERE work.upgrade_id = upgrades.id AND work.state = 'done'), 0)"
    )


def downgrade() -> None:
    op.drop_column("upgrades", "items_transformed")
