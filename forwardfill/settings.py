"""What the commands that talk to a running service must be told."""

from __future__ import annotations

from pathlib import Path

import httpx
import typer
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from forwardfill.wire import fits_a_header


def named_folder(text: str) -> Path:
    """The folder that an option names. Nothing would be the present one, which a script with an unset variable does not mean."""
    if not text:
        raise typer.BadParameter("it is empty; name a folder, or leave the option out")
    return Path(text)


class ClientSettings(BaseSettings):
    """Read from `FORWARDFILL_*`."""

    model_config = SettingsConfigDict(env_prefix="FORWARDFILL_", env_ignore_empty=True, extra="ignore")

    url: str = Field(
        default="http://127.0.0.1:8000",
        description="The service that commands talk to.",
        json_schema_extra={"secret": True},
    )
    api_key: SecretStr | None = Field(
        default=None, description="The key that they send.", json_schema_extra={"secret": True}
    )
    import_folder: Path | None = Field(default=None, description="FAISS indexes are imported from here only.")

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        try:
            parsed = httpx.URL(url)
            known = parsed.scheme in ("http", "https") and bool(parsed.host)
        except httpx.InvalidURL:  # its message shows parts of the URL, and so perhaps of a password
            known = False
        if not known:
            raise ValueError("is not of the form http://127.0.0.1:8000") from None
        return url

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, key: SecretStr | None) -> SecretStr | None:
        if key and not fits_a_header(key.get_secret_value()):
            raise ValueError("has spaces or signs that no key has")
        return key
