"""How many bytes the buffers of an Arrow IPC stream have once they are decompressed, before any is.

A buffer of zeros is compressed to a ten-thousandth, and Arrow decompresses all of a batch at once: so what a stream says of its
buffers is read first, as the format has it (format/Message.fbs of Apache Arrow, in FlatBuffers).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

_DICTIONARY, _RECORDS = 2, 3  # kinds of a message's header


class _Table(NamedTuple):
    """A table of FlatBuffers: its fields are found by a list of offsets before it."""

    data: bytes
    at: int

    def field(self, number: int) -> int | None:
        """Where a field is; None if it is absent."""
        offsets = self.at - self._read("<i", self.at)
        entry = 4 + 2 * number
        within = self._read("<H", offsets + entry) if entry < self._read("<H", offsets) else 0
        return self.at + within if within else None

    def number(self, number: int) -> int:
        """A field of one byte; 0 if it is absent."""
        at = self.field(number)
        return 0 if at is None else self._read("<B", at)

    def follow(self, number: int) -> int | None:
        """Where that begins to which a field refers."""
        at = self.field(number)
        return None if at is None else at + self._read("<I", at)

    def table(self, number: int) -> _Table:
        """The table to which a field refers."""
        at = self.follow(number)
        if at is None:
            raise ValueError(f"a message lacks its field {number}")
        return _Table(self.data, at)

    def pairs(self, number: int) -> Iterator[tuple[int, int]]:
        """The pairs of numbers in the list to which a field refers."""
        at = self.follow(number)
        if at is not None:
            yield from struct.iter_unpack("<qq", self.data[at + 4 : at + 4 + 16 * self._read("<I", at)])

    def _read(self, form: str, at: int) -> int:
        if at < 0:
            raise ValueError("a message refers to what is before it")
        found: int = struct.unpack_from(form, self.data, at)[0]
        return found


def decompressed_bytes(source: Any) -> Iterator[int]:
    """The bytes that the compressed buffers of each message of a stream say they have.

    Args:
        source: the stream, from its beginning.

    Raises:
        ValueError, pa.ArrowException: it is no stream.
    """
    for message in pa.ipc.MessageReader.open_stream(source):
        try:
            yield sum(_said(message))
        except struct.error as error:
            raise ValueError(f"a message's description is cut off ({error})") from error


def _said(message: Any) -> Iterator[int]:
    metadata = message.metadata.to_pybytes()
    described = _Table(metadata, struct.unpack_from("<I", metadata)[0])
    kind = described.number(1)
    if kind not in (_DICTIONARY, _RECORDS):
        return
    records = described.table(2)
    if kind == _DICTIONARY:
        records = records.table(1)
    if records.field(3) is None:  # nothing is compressed
        return
    body = memoryview(message.body)
    for offset, length in records.pairs(2):
        if length >= 8 <= len(body) - offset and offset >= 0:
            # A buffer begins with its length decompressed; -1 where it was left as it is.
            yield max(0, struct.unpack_from("<q", body, offset)[0])
