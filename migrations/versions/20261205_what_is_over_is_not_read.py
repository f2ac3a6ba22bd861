"""What is over is not read for what goes on: rows of upgrades, of their work and of the audit trail stay for good.

Each segment that was removed was looked for in the work of all upgrades ever, and each write asked for those of its gallery
among all. SQLite takes the index of active upgrades only for a condition that is written as the index has it.

Revision: 20261205, after 20261204
"""

import sqlalchemy as sa
from alembic import op

revision = "20261205"
down_revision = "20261204"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_upgrade_segments_segment_id", "upgrade_segments", ["segment_id"])
    op.create_index("ix_upgrades_gallery_id", "upgrades", ["gallery_id"])
    op.create_index("ix_events_gallery", "events", ["gallery"])
    _active("active = 1")


def downgrade() -> None:
    _active("active")
    op.drop_index("ix_events_gallery", "events")
    op.drop_index("ix_upgrades_gallery_id", "upgrades")
    op.drop_index("ix_upgrade_segments_segment_id", "upgrade_segments")


def _active(condition: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.drop_index("upgrades_active", "upgrades")
        op.create_index("upgrades_active", "upgrades", ["gallery_id"], unique=True, sqlite_where=sa.text(condition))
