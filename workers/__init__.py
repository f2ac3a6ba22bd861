"""The Celery process: transforms segments, builds indexes, sweeps."""
