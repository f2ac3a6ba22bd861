"""The one history of the catalog's schema, for SQLite and PostgreSQL."""
