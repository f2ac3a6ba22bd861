"""What a worker must be told."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class WorkerSettings(BaseSettings):
    """Read from `FORWARDFILL_*` by the worker, and by whoever nudges it."""

    model_config = SettingsConfigDict(env_prefix="FORWARDFILL_", extra="ignore")

    data: Path = Field(default=Path("forwardfill-data"), description="Folder of columns, indexes and artifacts.")
    broker_url: str = Field(
        default="",
        description="Celery broker, such as redis://localhost:6379/0; empty means a folder beside the data, no server.",
    )
    device: str = Field(default="auto", description="Where transformations run: auto, cpu, cuda, cuda:1, ...")
    # A nudge is sent when there is work, so this bounds only what the loss of a message, or a throttle's end, costs.
    sweep_seconds: float = Field(default=0.5, gt=0, description="How often a worker looks for work by itself.")
    orphan_seconds: float = Field(
        default=3600.0, gt=0, description="Files that no row names are removed once they are this old."
    )
