"""How arrays, items, queries, files and events go over the wire: into bodies and streams, and out of them."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from operator import index
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import orjson

from forwardfill.answers import Json
from forwardfill.errors import ImpossibleName

#: anything that NumPy makes an array of real numbers from
Vectors = npt.ArrayLike

UPLOAD_BLOCK = 1 << 20
#: JSON around a vector and a payload; an estimate, to keep requests below the server's limit of bytes
ITEM_OVERHEAD = 256
_STEPS_INWARDS = 8


class Event(NamedTuple):
    """One Server-Sent Event of an upgrade."""

    #: `progress` or `state`
    name: str
    data: Json
    #: for `Last-Event-ID`; None where the event has none
    id: str | None


def real(vectors: Vectors, name: str) -> npt.NDArray[np.float32]:
    """What is given for an argument, as float32.

    Raises:
        ValueError: it is not made of real numbers, so that NumPy would leave a part out, or read numbers into it; or NumPy cannot
            read it at all.
    """
    if isinstance(vectors, np.ma.MaskedArray) and np.ma.is_masked(vectors):
        raise ValueError(f"{name}: some of it is masked, and what is under a mask is no number; leave such vectors out")
    try:
        array = np.asarray(vectors)
    except (TypeError, ValueError, RuntimeError) as error:  # of NumPy, or of the library whose array it is
        raise ValueError(f"{name}: {error}; convert it to a NumPy array of float32") from error
    # Types that other libraries add, such as bfloat16, have no kind of their own, but can be cast.
    if array.dtype == bool or not np.can_cast(array.dtype, np.float64, "same_kind"):
        a_column = array.ndim == 1 and len(array) > 0 and np.ndim(array[0]) == 1  # of a data frame
        mend = "make one array of these rows with np.stack" if a_column else "convert them to float32"
        raise ValueError(f"{name}: vectors are real numbers, not {array.dtype}; {mend}")
    return array.astype("<f4", copy=False)


def loaded(path: Path) -> npt.NDArray[Any]:
    """The array of an `.npy` file.

    Raises:
        ValueError: the file is none, or holds objects.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            found: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged head fails in as many ways as a bad program does
        raise ValueError(f"{path} is not an .npy file of numbers: {error}") from error
    return found


def as_json(body: Any, place: str = "") -> bytes:
    """A body, or what has a place in one, as JSON, in which NumPy's numbers are numbers.

    Raises:
        TypeError: it holds what JSON has no word for.
        ValueError: it holds NaN or infinity. JSON has neither, and `null`, which would be sent, is something else: of a throttle,
            for instance, it takes the limit away.
    """
    try:
        content = _dumped(body)
    except TypeError as error:
        raise TypeError(f"{_wrong(body, place)}: {error}") from error
    if b"null" in content:  # which is also what is meant by None, and may be a part of a text
        for where, number in _numbers(body, place):
            if not math.isfinite(number):
                raise ValueError(f"{where}: {number} is no number in JSON; leave it out, or send another")
    return content


def _dumped(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _wrong(value: Any, place: str) -> str:
    """A path to what is not JSON within a value: its first part that is not JSON, then that one's, for a few steps."""
    for _ in range(_STEPS_INWARDS):
        parts: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, each in parts:
            try:
                _dumped({name: each} if isinstance(value, dict) else each)
            except TypeError:
                value, place = each, f"{place}/{name}"
                break
        else:
            break
    return place


def _numbers(value: Any, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float | np.floating):
        yield place, float(value)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _numbers(each, f"{place}/{name}")
    elif isinstance(value, list | tuple | np.ndarray):
        for at, each in enumerate(value):
            yield from _numbers(each, f"{place}/{at}")


def id_list(ids: Iterable[str], name: str = "ids") -> list[str]:
    """What is given as ids, as a list.

    Raises:
        TypeError: it is one text, which Python would take for an id per letter, or it holds something else than texts.
    """
    if isinstance(ids, str | bytes):
        raise TypeError(f"{name}: {ids!r} is one, not several; put it into a list")
    found = list(ids)
    for at, each in enumerate(found):
        if not isinstance(each, str):
            raise TypeError(
                f"{name}: number {at} is {each!r}, of type {type(each).__name__}; an id is a text: convert with str()"
            )
    return found


def label_list(labels: Iterable[int | str]) -> list[int | str]:
    """What is given as labels, as a list.

    Raises:
        TypeError: it is one text, which Python would take for a label per letter, or it holds something else than texts and whole
            numbers. NaN and None mostly mean that there is no label; as labels, they would be one that all such rows share.
    """
    if isinstance(labels, str | bytes):
        raise TypeError(f"labels: {labels!r} is one, not several; put it into a list")
    found = list[int | str]()
    for at, each in enumerate(labels):
        try:
            found.append(str(each) if isinstance(each, str) else index(each))
        except TypeError:
            raise TypeError(
                f"labels: number {at} is {each!r}, of type {type(each).__name__}; a label is a text or a whole number"
            ) from None
    return found


def payload_list(payloads: Iterable[Json | None]) -> list[Json | None]:
    """What is given as payloads, as a list.

    Raises:
        TypeError: it is one payload, or payloads by id, or a text.
    """
    if isinstance(payloads, Mapping | str | bytes):
        kind = type(payloads).__name__
        raise TypeError(f"payloads: a list is meant, one for each id, in their order (None: none), not a {kind}")
    return list(payloads)


def by_model(vectors: Any, name: str) -> Mapping[str, Vectors]:
    """What is given for each of several models.

    Raises:
        TypeError: it does not say which model's it is.
    """
    if not isinstance(vectors, Mapping):
        kind = type(vectors).__name__
        raise TypeError(f"{name}: vectors by the model's name, as {{'MODEL': vectors}}, not of type {kind}")
    return vectors


def same_count(columns: Mapping[str, Sized | None]) -> int:
    """How many rows columns that belong together have. The columns are given by their names in messages; None is no column.

    Raises:
        ValueError: they have different numbers of rows.
    """
    counts = {name: len(each) for name, each in columns.items() if each is not None}
    first, count = next(iter(counts.items()), ("", 0))
    for name, found in counts.items():
        if found != count:
            raise ValueError(f"{count} {first}, but {found} {name}")
    return count


def encoded(vectors: Vectors, name: str = "vector") -> Any:
    """Encode a vector (d,) as base64 of little-endian float32; an array (n, d) as a list of n such strings.

    Raises:
        ValueError: what is given for the argument is of another shape, or no real numbers.
    """
    array = real(vectors, name)
    if array.ndim == 2:
        return [_base64(row) for row in array]
    if array.ndim != 1:
        raise ValueError(f"{name}: a vector has shape (d,) and vectors (n, d), not {array.shape}")
    return _base64(array)


def _base64(array: npt.NDArray[np.float32]) -> str:
    return base64.b64encode(array.tobytes()).decode()


class Rows:
    """Items on their way into requests."""

    def __init__(
        self,
        ids: Iterable[str],
        embeddings: Vectors,
        side_information: Vectors | None,
        payloads: Iterable[Json | None] | None,
    ) -> None:
        self.ids = id_list(ids)
        self.embeddings = _column(embeddings, "embeddings")
        self.side = None if side_information is None else _column(side_information, "side_information")
        self.payloads = None if payloads is None else payload_list(payloads)
        same_count(
            {"ids": self.ids, "embeddings": self.embeddings, "side-information": self.side, "payloads": self.payloads}
        )

    def bytes_per_item(self) -> int:
        """About how many bytes an item has as JSON."""
        floats = int(self.embeddings.shape[1]) + (0 if self.side is None else int(self.side.shape[1]))
        payload = max((len(as_json(each, f"/payloads/{at}")) for at, each in enumerate(self.payloads or ())), default=0)
        return ITEM_OVERHEAD + floats * 4 * 4 // 3 + payload + max((len(each) for each in self.ids), default=0)

    def items(self, part: slice) -> list[Json]:
        """Items as the contract has them."""
        found = []
        for at in range(*part.indices(len(self.ids))):
            item: Json = {"id": self.ids[at], "embedding": _base64(self.embeddings[at])}
            if self.side is not None:
                item["side_information"] = _base64(self.side[at])
            if self.payloads is not None and self.payloads[at] is not None:
                item["payload"] = self.payloads[at]
            found.append(item)
        return found


def parse_events(stream: Iterable[str]) -> Iterator[Event]:
    """Parse the lines of a stream of Server-Sent Events whose data is JSON; comments are skipped."""
    name, data, last_id = "", list[str](), None
    for line in stream:
        if not line:
            if data:
                yield Event(name or "message", orjson.loads("\n".join(data)), last_id)
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id":
            last_id = value


def lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Split a stream at line feeds only: text in JSON may hold the other characters that Python takes for line ends."""
    rest = b""
    for chunk in chunks:
        *ended, rest = (rest + chunk).split(b"\n")
        for line in ended:
            yield line.removesuffix(b"\r").decode()


def blocks(path: Path) -> Iterator[bytes]:
    """A file, in blocks."""
    with path.open("rb") as file:
        while block := file.read(UPLOAD_BLOCK):
            yield block


def pieces(content: bytes) -> Iterator[bytes]:
    """A body, in pieces of the same size."""
    for start in range(0, len(content), UPLOAD_BLOCK):
        yield content[start : start + UPLOAD_BLOCK]


def matrix(vectors: Vectors, name: str) -> npt.NDArray[np.float32]:
    """The value of an argument as an array (n, d)."""
    array = real(vectors, name)
    if array.ndim != 2:
        raise ValueError(f"{name}: vectors have shape (n, d), not {array.shape}")
    return array


def _column(vectors: Vectors, name: str) -> npt.NDArray[np.float32]:
    """As `matrix`, but an empty list is allowed: an array without rows."""
    array = real(vectors, name)
    return array.reshape(0, 0) if array.shape == (0,) else matrix(array, name)


def query(vector: Vectors, companions: Mapping[str, Vectors] | None) -> Json:
    """A query's vectors, as a search has them."""
    asked: Json = {"vector": _one(vector, "vector")}
    others = {} if companions is None else by_model(companions, "companions")
    if others:
        asked["companions"] = {model: _one(each, companion(model)) for model, each in others.items()}
    return asked


def _one(vector: Vectors, name: str) -> str:
    array = real(vector, name)
    if array.ndim != 1:
        raise ValueError(f"{name}: one vector has shape (d,), not {array.shape}; `search_batch` takes several")
    return _base64(array)


def companion(model: str) -> str:
    """The name of one model's companions in messages."""
    return f"companions of {model}"


def options(
    k: int | None, condition: Json | None, include: Sequence[str], allow_partial: bool, oversample: int | None
) -> Json:
    """The fields of a search beside its vectors, without those that have the service's defaults."""
    said: Json = {}
    if k is not None:
        said["k"] = k
    if condition is not None:
        said["filter"] = condition
    if include:
        said["include"] = id_list(include, "include")
    if allow_partial:
        said["allow_partial"] = True
    if oversample is not None:
        said["oversample"] = oversample
    return said


def fits_a_header(key: str) -> bool:
    """Whether a key can be sent in a header. HTTP libraries refuse others with a message that shows the key."""
    return re.fullmatch("[!-~]+", key) is not None


def named(name: str) -> str:
    """The name or id of what a path is about, as one part of that path.

    Raises:
        ImpossibleName: it cannot be one, and the path would be that of something else.
    """
    if not name or "/" in name or not name.isprintable():
        raise ImpossibleName(f"{name!r} cannot be a name or an id: these are made of letters, digits, '.', '_' and '-'")
    return quoted(name)


def quoted(name: str) -> str:
    """Any text as one part of a path. `.` and `..` are quoted too, because they would be resolved like folders."""
    return name.replace(".", "%2E") if name in (".", "..") else quote(name, safe="")
