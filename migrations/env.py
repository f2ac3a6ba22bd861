"""Run by Alembic, through `gallery.catalog.schema`, which passes the open connection."""

from __future__ import annotations

from alembic import context

from gallery.catalog.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    # SQLite cannot alter a column: Alembic then copies the table.
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
