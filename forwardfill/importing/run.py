"""The loop: read a batch, send it, note that it is stored. Whatever ends it, the next run goes on behind the last note.

A batch that was stored but not noted is sent again. That changes nothing, since its rows replace themselves.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pyarrow as pa

from forwardfill.client import Client
from forwardfill.errors import ForwardfillError
from forwardfill.importing import duplicates
from forwardfill.importing.column import BadInput
from forwardfill.importing.rows import Rows
from forwardfill.importing.state import State

#: of vectors and payloads; formats that are decoded need several times as much while they are read
REQUEST_BYTES = 64 << 20
#: what a merge of small segments makes at most, so larger segments from here would stay apart
REQUEST_ROWS = 100_000
#: seconds between tries, while the service is overloaded or starts again
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_OVERLOADED = {429, 503}


def batch_rows(limits: Mapping[str, int], row_bytes: int, wanted: int | None) -> int:
    """How many rows a request has: as many as are wanted, within the service's limits, else as many as are good."""
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
        stored: told how many rows are stored, at first and after each batch.
        pauses: seconds to wait before each further try of a batch.

    Raises:
        BadInput: a row cannot be imported; those of earlier batches are stored.
        ForwardfillError: the service refuses the import as a whole.
        httpx.TransportError: the service stays away.
    """
    done = state.rows()
    duplicates.refuse(rows)
    size = batch_rows(client.info()["limits"], rows.row_bytes(), batch)
    stored(done)
    for each in rows.batches(done, size):
        _send(client, gallery, model, each, rows, done, pauses)
        done += len(each)
        state.save(done)
        stored(done)
    state.remove()


def _send(
    client: Client, gallery: str, model: str, batch: Any, rows: Rows, start: int, pauses: tuple[float, ...]
) -> None:
    stream = _encoded(batch)
    for pause in (*pauses, None):
        try:
            client.upsert_arrow(gallery, model, stream)
        except ForwardfillError as error:
            if pause is None or error.status not in _OVERLOADED:
                raise _named(error, rows, start) from error
        except httpx.TransportError:
            if pause is None:
                raise
        else:
            return
        time.sleep(pause)


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
            item = int(pointed[1])  # which the service's words may name
            where = f"{column.where}, row {start + item}, item {item} of its request"
            return BadInput(f"{where}: {each.get('detail')} ({error.code})")
    return error
