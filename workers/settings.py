"""What a worker must be told."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from gallery.settings import Count, Seconds

# Redis is what is tested; the others are those for which nothing more has to be installed.
_BROKERS = {"redis", "rediss", "amqp", "amqps"}
# What a URL of Redis may say after a `?`: Celery ends at any other name, and at any other check, when it connects.
_TLS = {"ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"}
_CHECKS = {"required", "optional", "none", "CERT_REQUIRED", "CERT_OPTIONAL", "CERT_NONE"}


class WorkerSettings(BaseSettings):
    """Read from `FORWARDFILL_*` by the worker, and by whoever nudges it."""

    model_config = SettingsConfigDict(env_prefix="FORWARDFILL_", env_ignore_empty=True, extra="ignore")

    broker_url: str = Field(
        default="",
        description="Celery broker, such as redis://localhost:6379/0; empty means files in the data folder, no server.",
        json_schema_extra={"secret": True},
    )
    device: str = Field(
        default="auto",
        description="Where transformations run: cpu, cuda, cuda:1, ...; auto takes a GPU that no other worker has.",
    )
    computed_in: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Number type of upgrades, and of searches' candidates: auto takes bfloat16 where faster and near enough.",
    )
    # The network of FCT is within 0.006. Two vectors that are so far apart have a cosine of 0.99998.
    largest_error: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Farthest that a vector in bfloat16 may be from the one in float32, as a part of its length.",
    )
    # A nudge is sent when there is work, so this bounds only what the loss of a message costs, and how late a worker comes to
    # what a throttle allows: it catches up with a second of that.
    sweep_seconds: Seconds = Field(default=0.5, description="How often a worker looks for work by itself.")
    # Each segment costs every search a little, and each merge writes rows again: of more, or fewer, one would be felt.
    compact_segments: Count = Field(
        default=16, ge=0, description="Small segments that are merged into one; 0 means only where it is asked for."
    )
    compact_rows: Count = Field(default=100_000, ge=1, description="Largest segment that a merge makes.")
    # Searches take milliseconds and a process looks for newer versions several times a second.
    retired_seconds: Seconds = Field(
        default=60.0, description="How long merged segments are kept for searches that began before."
    )
    orphan_seconds: Seconds = Field(
        default=3600.0, description="Files that no row names are removed once they are this old."
    )

    @field_validator("device")
    @classmethod
    def _device_that_may_be(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,3}))?", device):
            raise ValueError("is not auto, cpu, cuda, or cuda:N")
        return device

    @field_validator("broker_url")
    @classmethod
    def _broker_that_works(cls, url: str) -> str:
        try:
            split = urlsplit(url)
            known = not url or (split.scheme in _BROKERS and bool(split.hostname) and split.port != 0)
            known = known and not (split.scheme.startswith("redis") and _strange(split.query))
        except ValueError:  # whose message has parts of the URL, and so perhaps of the password
            known = False
        if not known:
            raise ValueError(
                "is not the URL of a broker, such as redis://:PASSWORD@HOST:6379/0 or "
                "rediss://:PASSWORD@HOST:6379/0?ssl_ca_certs=FILE; empty, it is files in the data folder"
            ) from None
        return url


def _strange(query: str) -> bool:
    """Whether a URL of Redis has options that Celery does not take."""
    options = parse_qs(query, keep_blank_values=True)
    return not (options.keys() <= _TLS and _CHECKS.issuperset(options.get("ssl_cert_reqs", ())))
