"""What the commands that talk to a running service must be told."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class ClientSettings(BaseSettings):
    """Read from `FORWARDFILL_*`."""

    model_config = SettingsConfigDict(env_prefix="FORWARDFILL_", extra="ignore")

    url: str = Field(default="http://127.0.0.1:8000", description="The service that commands talk to.")
    api_key: SecretStr | None = Field(default=None, description="The key that they send.")
    import_folder: Path | None = Field(default=None, description="FAISS indexes are imported from here only.")
