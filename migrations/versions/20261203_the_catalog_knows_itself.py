"""The catalog has an identity, which its data folder bears too: until now, whoever came with the wrong one was taken at his word.

Revision: 20261203, after 20261202
"""

import sqlalchemy as sa
from alembic import op
from ulid import ULID

revision = "20261203"
down_revision = "20261202"
branch_labels = None
depends_on = None


def upgrade() -> None:
    identity = op.create_table("identity", sa.Column("id", sa.String(length=26), primary_key=True))
    op.bulk_insert(identity, [{"id": str(ULID())}])


def downgrade() -> None:
    op.drop_table("identity")
