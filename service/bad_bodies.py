"""What is wrong with a body that is refused: which number is not finite, where it stands, and of which item it is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import orjson
from pydantic import BaseModel

from gallery import errors
from service import pieces
from service.errors import InvalidJson, InvalidRequest

# Bytes that may be searched for NaN at once, by Python's parser, which holds the interpreter for 50 ms.
_SEARCHED_AT_ONCE = 2 * 1024 * 1024
#: what any number that is not finite has: a word of Python's and JavaScript's, an exponent of three digits, or 309 digits
_NOT_FINITE = re.compile(rb"NaN|Infinity|[eE]\+?0*[1-9]\d{2}|(?<!\d)\d{309}")
_OVERLAP = 512  # a match may begin in one part and end in the next


def not_json(model: type[BaseModel], raw: bytes, error: orjson.JSONDecodeError) -> errors.GalleryError:
    """The refusal of a body that is not JSON. NaN and infinity, which many writers make, are told apart from broken JSON."""
    if not raw:
        return InvalidJson("the body is empty; send JSON")
    if not _may_have_not_finite(raw):
        return InvalidJson(f"the body is not JSON: {error}")
    try:
        value = pieces.loads(raw, one=_tolerant)
        where = next(not_finite(value), None)
        if where is not None:
            kind, place, item = _kind(model, where), errors.pointer(*where), item_of(value, where)
            # What has a lone surrogate is not JSON either, and no answer could repeat it.
            "".join((place, *item.values())).encode()
            return kind("NaN, infinity, or a number beyond float64", pointer=place, **item)
    except (ValueError, RecursionError):
        pass
    return InvalidJson(f"the body is not JSON: {error}")


def item_of(value: Any, at: tuple[int | str, ...]) -> dict[str, str]:
    """The id of the item that a location leads to, for a refusal to name it; empty if there is none."""
    match at:
        case ("items", int(row), *_):
            match value["items"][row]:
                case {"id": str(name)}:
                    return {"item": name}
    return {}


def not_finite(value: object, at: tuple[int | str, ...] = ()) -> Iterator[tuple[int | str, ...]]:
    """Where in a value numbers are NaN or infinity."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from not_finite(inner, (*at, name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from not_finite(inner, (*at, place))
    elif isinstance(value, float) and not math.isfinite(value):
        yield at


def _may_have_not_finite(raw: bytes) -> bool:
    """Whether there may be a number that is not finite. In parts: a pattern holds the interpreter until it is done."""
    parts = range(0, len(raw), pieces.PIECE)
    return any(_NOT_FINITE.search(raw, at, at + pieces.PIECE + _OVERLAP) for at in parts)


def _tolerant(piece: bytes) -> Any:
    """Parse JSON as many write it: with NaN and infinity."""
    try:
        return orjson.loads(piece)
    except orjson.JSONDecodeError:
        if len(piece) > _SEARCHED_AT_ONCE:
            raise
        return json.loads(piece)


def _kind(model: type[BaseModel], at: tuple[int | str, ...]) -> type[errors.GalleryError]:
    """The error for a number that is not finite, by where it stands in a body: the one for other bad values there."""
    match at:
        case (str(field), *_) if field not in model.model_fields:
            return InvalidRequest
        case ("filter", *_):
            return errors.InvalidFilter
        case ("items", int(), "payload", *_):
            return errors.InvalidItem
        case (
            ("vector", *_)
            | ("companions", _, *_)
            | ("queries", int(), int())
            | ("queries", int(), "vector", *_)
            | ("queries", int(), "companions", _, *_)
            | ("items" | "pairs", int(), "embedding" | "side_information", *_)
            | ("probes", int(), "vectors", _, *_)
            | ("source_embeddings" | "target_embeddings" | "side_information", int(), *_)
        ):
            return errors.InvalidVector
    return InvalidRequest
