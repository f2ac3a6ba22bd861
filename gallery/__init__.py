"""The domain: items, segments, search and upgrades. NumPy, FAISS and SQLAlchemy; no torch, no HTTP, no Celery."""
