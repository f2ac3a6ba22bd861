"""What the API process must be told, beside the gallery's settings."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from gallery.settings import YEAR, Bytes, Count, Seconds


class ServiceSettings(BaseSettings):
    """Read from `FORWARDFILL_*` by the composition root only."""

    model_config = SettingsConfigDict(env_prefix="FORWARDFILL_", env_ignore_empty=True, extra="ignore")

    host: str = Field(default="127.0.0.1", description="Address to listen on; any but loopback needs a key.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    processes: int = Field(default=1, ge=1, le=1024, description="API processes that answer behind the port.")
    insecure: bool = Field(default=False, description="Serve beyond loopback without a key.")
    max_body_bytes: Bytes = Field(default=64 * 1024 * 1024, ge=1, description="Bytes of one JSON body.")
    # A million items of 128 numbers are half a GiB. These two are streamed to disk, so they cost no memory.
    max_arrow_bytes: Bytes = Field(default=1024**3, ge=1, description="Bytes of one Arrow stream.")
    max_artifact_bytes: Bytes = Field(default=1024**3, ge=1, description="Bytes of one artifact.")
    # A batch of 8 KB may find 10 GB: a thousand queries that find the same thousand items, each with a payload of 10 KB.
    max_answer_bytes: Bytes = Field(default=256 * 1024 * 1024, ge=1, description="Bytes of one batch search's answer.")
    # A write must be seen by every process within one second; four looks in that time leave room for a slow one.
    refresh_seconds: Seconds = Field(default=0.25, description="How often changes of other processes are looked for.")
    max_concurrent_searches: Count = Field(default=16, ge=1, description="Searches at once; more wait.")
    max_waiting_searches: Count = Field(default=64, ge=0, description="Searches that may wait; more are answered 429.")
    max_concurrent_requests: Count = Field(default=32, ge=1, description="Requests other than searches at once.")
    max_waiting_requests: Count = Field(default=128, ge=0, description="Such requests that may wait.")
    max_streams: Count = Field(default=200, ge=1, description="Event streams at once; more are answered 429.")
    body_idle_seconds: Seconds = Field(
        default=30.0, description="How long a client may send nothing of its body, or read nothing of a long answer."
    )
    shutdown_seconds: int = Field(
        default=20, ge=1, le=YEAR, description="How long requests under way may take to finish at shutdown."
    )
