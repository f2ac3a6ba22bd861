"""The loop of an import: read a batch, send it, note that it is stored. However it ends, the next run goes on from the last note.

A batch that was stored but not noted is sent again. That changes nothing, since its rows replace themselves.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import pyarrow as pa

from forwardfill.client import Client
from forwardfill.errors import ForwardfillError
from forwardfill.importing import duplicates
from forwardfill.importing.column import BadInput
from forwardfill.importing.rows import Rows
from forwardfill.importing.state import State

#: how much of vectors and payloads a request has; reading them may take several times as much memory
REQUEST_BYTES = 64 << 20
#: the most rows of a request. A merge of small segments makes none with more rows, so more would not be merged later.
REQUEST_ROWS = 100_000
#: seconds between tries, while the service is overloaded or starts again
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_OVERLOADED = {408, 429, 503}


def batch_rows(limits: Mapping[str, int], row_bytes: int, wanted: int | None) -> int:
    """How many rows a request has: as many as `wanted`, else a good number; in any case within the service's limits."""
    fitting = limits["max_arrow_bytes"] * 9 // 10 // row_bytes
    good = wanted or min(REQUEST_ROWS, REQUEST_BYTES // row_bytes)
    return max(1, min(good, fitting, limits["max_items_per_arrow"]))


def run(
    client: Client,
    gallery: str,
    model: str,
    rows: Rows,
    state: State,
    *,
    batch: int | None = None,
    stored: Callable[[int], None],
    pauses: tuple[float, ...] = PAUSES,
) -> None:
    """Send all rows that are not stored yet.

    Args:
        client: of the service.
        gallery: its name.
        model: that made the embeddings.
        rows: what to send.
        state: how far an earlier run came.
        batch: rows per request; a good number unless given.
        stored: called with how many rows are stored, at the start and after each batch.
        pauses: seconds to wait before each further try of a batch.

    Raises:
        BadInput: a row cannot be imported; those of earlier batches are stored.
        ForwardfillError: the service refuses the import as a whole.
        httpx.TransportError: the service stays away.
    """
    done = state.rows()
    state.check()  # before anything is stored that could not be noted
    duplicates.refuse(rows)
    limits = client.info()["limits"]
    size = batch_rows(limits, rows.row_bytes(), batch)
    sender = _Sender(client, gallery, model, rows, limits["max_arrow_bytes"], pauses)
    stored(done)
    for each in rows.batches(done, size):
        for count in sender.send(each, done):
            done += count
            state.save(done)
            stored(done)
    state.remove()


@dataclass(slots=True)
class _Sender:
    """Sends batches; in halves if they are too large, since the size of a row is only estimated from the first ones."""

    client: Client
    gallery: str
    model: str
    rows: Rows
    #: the most bytes of a request; less than the service's limit once a proxy in front of it refused some
    most: int
    pauses: tuple[float, ...]
    #: whose limit that is
    limit: str = "max_arrow_bytes, the service's limit"

    def send(self, batch: Any, start: int) -> Iterator[int]:
        """Send a batch. Yields how many more rows are stored, each time some are.

        Raises:
            BadInput: the service refuses a row, or it is too large by itself.
        """
        stream = _encoded(batch)
        size = len(stream)
        if size <= self.most and self._taken(stream, start):
            yield len(batch)
            return
        del stream  # before its halves are made
        if len(batch) == 1:
            raise BadInput(self._too_large(batch, size, start))
        half = len(batch) // 2
        yield from self.send(batch.slice(0, half), start)
        yield from self.send(batch.slice(half), start + half)

    def _taken(self, stream: bytes, start: int) -> bool:
        """Send a request until it is answered; False if it is too large."""
        for pause in (*self.pauses, None):
            try:
                self.client.upsert_arrow(self.gallery, self.model, stream)
            except ForwardfillError as error:
                if error.status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
                    self.most, self.limit = len(stream) - 1, str(error)
                    return False
                if pause is None or error.status not in _OVERLOADED:
                    raise _named(error, self.rows, start) from error
            except httpx.TransportError:
                if pause is None:
                    raise
            else:
                return True
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _too_large(self, row: Any, size: int, start: int) -> str:
        columns = self.rows.columns()
        where = columns[max(columns, key=lambda name: row.column(name).nbytes)].where
        return (
            f"{where}, row {start}: has {size} bytes on its way, more than the {self.most} that are taken ({self.limit}); "
            "shorten it or leave it out"
        )


def _encoded(batch: Any) -> bytes:
    sink = io.BytesIO()  # gives what was written without another copy
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _named(error: ForwardfillError, rows: Rows, start: int) -> Exception:
    """Where the service points at an item of a request, point at the row of the file."""
    for each in error.errors:
        pointed = re.match(r"/items/(\d+)/(\w+)", str(each.get("pointer")))
        if pointed:
            column = rows.columns().get(pointed[2], rows.embeddings)
            item = int(pointed[1])  # named below because the service's text may name it
            where = f"{column.where}, row {start + item}, item {item} of its request"
            return BadInput(f"{where}: {each.get('detail')} ({error.code})")
    return error
