"""The header Idempotency-Key, and what a key stands for."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import orjson
from fastapi import Header

IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, description="The same request with the same key starts nothing new."),
]


def fingerprint(what: str, meant: Any, *, vectors: bytes | memoryview = b"") -> str:
    """What a key stands for: the request's meaning, not its spelling.

    Rows keep what older versions made of a request. So a field that a request gains is left out of `meant` where it has its
    default; else whoever repeats a request over an update is told that its key was used for another.

    Args:
        what: it starts.
        meant: all of it that JSON can say.
        vectors: the rest.
    """
    digest = hashlib.sha256(what.encode() + b"\n" + orjson.dumps(meant, option=orjson.OPT_SORT_KEYS))
    digest.update(vectors)
    return digest.hexdigest()
