"""Request bodies: read within a limit, JSON parsed once, vectors made arrays.

FastAPI would read a body before it checks the key, and parse it on the event loop. Here a body is a dependency: it comes
after the key, and a large one is parsed in a thread.
"""

from __future__ import annotations

import asyncio
import binascii
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from itertools import islice
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import numpy as np
import orjson
from fastapi import Depends, Request
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic import WithJsonSchema as JsonSchema
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool

from gallery import errors
from service import pieces
from service.bad_bodies import item_of, not_json
from service.errors import MAX_ERRORS, BodyTooLarge, InvalidJson, RequestTimeout, UnsupportedMediaType, invalid
from service.process import Process, ProcessDep

_PARSED_AT_ONCE = 256 * 1024  # bytes that may be parsed on the event loop: less than two milliseconds
_NOT_COUNTED = 64 * 1024  # bytes of a body that need no room: as many wait in the buffers of each connection anyway
_MODELS_AT_ONCE = 100
_NUMBERS = frozenset({int, float})
_BASE64 = "the base64 of little-endian float32 numbers, in its standard alphabet (+ and /) and padded"
_IN_NUMBERS = b"-+.0123456789eE, \t\r\nNaInfity"  # NaN and infinity among them


class Body(BaseModel):
    """A request body: no unknown fields, no conversion between JSON types.

    pydantic collects every error, which takes half a KB for what is four bytes in a body; so what there may be millions of is
    counted before it is looked at.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    #: by field, the setting that says how many elements its list may have
    limits: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, value: Any) -> Any:
        """Leave of very many unknown fields as many as a refusal names."""
        known = cls.__pydantic_fields__
        if not isinstance(value, dict) or len(value) <= len(known) + MAX_ERRORS:
            return value
        unknown = islice((name for name in value if name not in known), MAX_ERRORS)
        return {name: value[name] for name in (*(name for name in known if name in value), *unknown)}


T = TypeVar("T", bound=Body)
R = TypeVar("R")


def read_vector(value: object) -> NDArray[Any]:
    """The numbers as they came, finite or not: the gallery checks them, which knows the model."""
    if isinstance(value, list):
        if not _NUMBERS.issuperset(map(type, value)):
            raise PydanticCustomError("invalid_vector", "a vector is a list of numbers")
        numbers = np.array(value, dtype=np.float64)
        value.clear()  # at once: to free the numbers of all vectors together would stop every thread for 30 ms
        return numbers
    if isinstance(value, np.ndarray):  # `_loaded` puts one in place of a vector that is too long
        return value
    if isinstance(value, str):
        try:
            return np.frombuffer(binascii.a2b_base64(value, strict_mode=True), dtype="<f4")
        except (binascii.Error, ValueError):
            raise PydanticCustomError("invalid_vector", f"not {_BASE64}") from None
    raise PydanticCustomError("invalid_vector", f"a vector is a list of numbers, or {_BASE64}")


def _without_nul(value: str) -> str:
    """PostgreSQL cannot even be asked for text with a NUL."""
    if "\0" in value:
        raise ValueError("should be text without NUL characters")
    return value


def _label(value: object) -> int | str:
    """By hand: of a union, pydantic would say what is wrong once for each type, at a place that no body has."""
    if isinstance(value, str):
        return _without_nul(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("a label is a text or a whole number")


VECTOR_SCHEMA = {
    "anyOf": [
        {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 8192},
        {"type": "string", "contentEncoding": "base64", "description": "little-endian float32"},
    ],
    "description": f"A list of numbers, or {_BASE64}.",
    "examples": [[0.1, 0.2, 0.3]],
}
Vector = Annotated[NDArray[Any], PlainValidator(read_vector), JsonSchema(VECTOR_SCHEMA)]
NO_NUL = AfterValidator(_without_nul)
#: what people write; a limit of its length stands before `NO_NUL`, or pydantic would count it in items
Text = Annotated[str, NO_NUL]
#: the name of something that should be there
Reference = Annotated[str, StringConstraints(min_length=1, max_length=255), NO_NUL]
#: what items have in common that are relevant to each other
Label = Annotated[int | str, PlainValidator(_label), JsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}]})]


def _few_models(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MODELS_AT_ONCE:
        raise PydanticCustomError("too_many_models", f"at most {_MODELS_AT_ONCE} models, not {len(value)}")
    return value


#: vectors of one thing by the models that embedded it
ByModel = Annotated[dict[Reference, Vector], Field(max_length=_MODELS_AT_ONCE), BeforeValidator(_few_models)]


class Json(Generic[T]):
    """A dependency that gives the parsed body, and gives its memory's room back when the handler is done."""

    def __init__(self, model: type[T], *, optional: bool = False) -> None:
        """Parse into `model`; an empty body stands for `{}` where it is optional."""
        self._model = model
        self._optional = optional

    async def __call__(self, request: Request, process: ProcessDep) -> AsyncIterator[T]:
        """Read the body, and parse it: in a thread if it is large."""
        async with _read(request, process) as parts:
            if self._optional and not any(parts):
                yield self._model()
                return
            require_type(request, "application/json")
            if not _is_large(parts):
                yield self._parsed(parts, process)
                return
            async with process.parsing:
                body = await run_in_threadpool(self._parsed, parts, process)
            yield body

    @asynccontextmanager
    async def made(self, request: Request, process: Process, make: Callable[[T], R]) -> AsyncIterator[R]:
        """Read the body, parse it and make something of it, both in one thread; then the body is let go of."""
        async with _read(request, process) as parts:
            require_type(request, "application/json")
            async with process.parsing if _is_large(parts) else nullcontext():
                made = await run_in_threadpool(lambda: make(self._parsed(parts, process)))
            yield made

    def _parsed(self, parts: list[bytes], process: Process) -> T:
        """Join and parse the parts. Joining is done here, perhaps in a thread, because of 64 MB it takes 20 ms."""
        raw = b"".join(parts)
        parts.clear()
        return parse(self._model, raw, lambda: _longest(process), lambda name: getattr(process.store.settings, name))


def parsed(model: type[Body], *, optional: bool = False) -> Any:
    """The body, for a handler; its room is given back when that is done, not when a slow client has read the answer."""
    return Depends(Json(model, optional=optional), scope="function")


def _is_large(parts: list[bytes]) -> bool:
    return sum(map(len, parts)) > _PARSED_AT_ONCE


def _longest(process: Process) -> int:
    """Numbers of the longest vector that some model has, or may have."""
    models = process.galleries.current.registry.models.values()
    return max([process.store.settings.max_dimension, *(each.dimension for each in models)])


def parse(
    model: type[T],
    raw: bytes,
    longest: Callable[[], int] = lambda: sys.maxsize,
    limit: Callable[[str], int] = lambda _: sys.maxsize,
) -> T:
    """Parse JSON into a body.

    Args:
        model: the body's shape.
        raw: the JSON.
        longest: says how many numbers a vector may have; a longer one need not be parsed to be refused.
        limit: says of a setting how much it is.

    Raises:
        InvalidJson: it is not JSON.
        LimitExceeded: a list has more elements than its limit.
        InvalidRequest, InvalidVector, InvalidFilter, InvalidItem: it does not have the documented shape.
    """
    try:
        value = orjson.loads(raw) if len(raw) <= pieces.PIECE else _loaded(model, raw, longest)
    except orjson.JSONDecodeError as error:
        raise not_json(model, raw, error) from None
    for field, name in model.limits.items():
        if isinstance(value, dict) and isinstance(value.get(field), list):
            within(len(value[field]), limit(name), name, errors.pointer(field))
    return validated(model, value)


def validated(model: type[T], value: Any) -> T:
    """A parsed value as a body.

    Raises:
        InvalidRequest, InvalidVector: it does not have the documented shape.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        item = item_of(value, found[0]["loc"])
        raise invalid([(each["loc"], each["type"], each["msg"]) for each in found], **item) from None


@asynccontextmanager
async def _read(request: Request, process: Process) -> AsyncIterator[list[bytes]]:
    """The whole body, in the parts in which it came, and room for it.

    No slot is held while a body comes in. What bounds the memory is the room that all bodies share: as many bytes as the
    requests that may run at once may send. Room is taken for bytes that have come, and not for the length that was declared,
    so slow senders take little from others. The first bytes need none, so large bodies never get small ones refused.

    Raises:
        BodyTooLarge, RequestTimeout, UnsupportedMediaType: as `chunks`.
        Overloaded: the bodies of others leave no room.
    """
    parts, size, held = list[bytes](), 0, 0
    try:
        async for chunk in chunks(request, process, process.settings.max_body_bytes, "max_body_bytes"):
            size += len(chunk)
            if size > _NOT_COUNTED:
                process.bodies.take(size - _NOT_COUNTED - held)
                held = size - _NOT_COUNTED
            parts.append(chunk)
        yield parts
    finally:
        process.bodies.give_back(held)


async def chunks(request: Request, process: Process, limit: int, name: str) -> AsyncIterator[bytes]:
    """The body as it comes, counted.

    Raises:
        BodyTooLarge: it is larger than the limit, as declared or as it came.
        RequestTimeout: nothing came for too long.
        UnsupportedMediaType: it is compressed.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedMediaType("a compressed body is not read; send it as it is")
    too_large = BodyTooLarge(f"the body may have {limit} bytes ({name})", limit=name, maximum=limit)
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > limit:
        raise too_large
    size, stream = 0, request.stream()
    while (chunk := await in_time(anext(stream, None), process)) is not None:
        size += len(chunk)
        if size > limit:
            raise too_large
        yield chunk


def _loaded(model: type[Body], raw: bytes, longest: Callable[[], int]) -> Any:
    """Parse a large body in pieces, so that others get their turn. Of a vector that is too long, numbers are only counted."""
    at = pieces.first_array(raw, "vector") if "vector" in model.model_fields else None
    if at is None:
        return pieces.loads(raw)
    end = raw.find(b"]", at)
    parts = [(start, min(start + pieces.PIECE, end)) for start in range(at, end, pieces.PIECE)]
    numbers = 1 + sum(raw.count(b",", *part) for part in parts)
    if numbers <= longest() or any(raw[slice(*part)].translate(None, _IN_NUMBERS) for part in parts):
        return pieces.loads(raw)
    try:
        value = orjson.loads(raw[:at] + raw[end:])
    except orjson.JSONDecodeError:
        raise InvalidJson(f"the body is not JSON, apart from a vector of {numbers} numbers") from None
    return {**value, "vector": np.broadcast_to(np.float64(0), numbers)}  # which takes no memory


async def in_time(part: Awaitable[R], process: Process) -> R:
    """Wait for a part of a body.

    Raises:
        RequestTimeout: it did not come.
    """
    seconds = process.settings.body_idle_seconds
    try:
        async with asyncio.timeout(seconds):
            return await part
    except TimeoutError:
        raise RequestTimeout(f"nothing of the body came for {seconds:g} s (body_idle_seconds)") from None


def require_type(request: Request, *allowed: str) -> str:
    """The body's media type; JSON if the client did not say.

    Raises:
        UnsupportedMediaType: it is another one.
    """
    given = media_type(request)
    if given not in allowed:
        raise UnsupportedMediaType(f"the body is {given}; send {' or '.join(allowed)}", supported=list(allowed))
    return given


def media_type(request: Request) -> str:
    """The body's media type without parameters; JSON if the client did not say."""
    return request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()


def stack(vectors: Sequence[NDArray[Any] | None], dimension: int, model: str, at: str) -> NDArray[Any]:
    """Vectors as one (n, dimension) array, without those that are null.

    Args:
        vectors: of any width.
        dimension: what each must have.
        model: whose dimension it is, for the message.
        at: JSON pointer of a vector; `{row}` in it is replaced by its position.

    Raises:
        DimensionMismatch: one has another dimension.
    """
    for row, vector in enumerate(vectors):
        if vector is not None and len(vector) != dimension:
            raise errors.DimensionMismatch(
                f"vectors of {model} have dimension {dimension}, this has {len(vector)}", pointer=at.format(row=row)
            )
    present = [vector for vector in vectors if vector is not None]
    return np.stack(present) if present else np.empty((0, dimension), np.float32)


def within(value: int, maximum: int, name: str, at: str) -> None:
    """Hold a published limit.

    Raises:
        LimitExceeded: it is passed.
    """
    if value > maximum:
        raise errors.LimitExceeded(f"{value} is more than {name}, {maximum}", pointer=at, limit=name, maximum=maximum)
