"""Pairs to fit a transformation to, as the service takes them: ids of items, and another model's vectors of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from forwardfill.wire import Vectors, id_list, label_list, loaded, matrix, same_count


def stream(ids: Iterable[str], embeddings: Vectors, labels: Iterable[int | str] | None = None) -> bytes:
    """Write pairs as an Arrow IPC stream.

    Args:
        ids: n ids of items that the gallery has.
        embeddings: (n, dimension) by the target model.
        labels: n labels, of all pairs or of none.

    Raises:
        TypeError: ids are no texts, labels neither texts nor whole numbers, or one text is given in place of several.
        ValueError: lengths differ, or the embeddings are no matrix of numbers.
    """
    vectors = matrix(embeddings, "embeddings")
    names = id_list(ids)
    kinds = None if labels is None else label_list(labels)
    same_count({"embeddings": vectors, "ids": names, "labels": kinds})
    columns = {"id": names, "embedding": pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])}
    if kinds is not None:
        columns["label"] = [str(each) for each in kinds]
    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def from_files(ids: Path, embeddings: Path, labels: Path | None) -> bytes:
    """Read pairs from an `.npy` file of embeddings, and from text files with one id, or one label, a line.

    Raises:
        ValueError: they do not belong together, or one is not what it should be.
        OSError: one cannot be read.
    """
    return stream(_lines(ids), loaded(embeddings), None if labels is None else _lines(labels))


def _lines(path: Path) -> list[str]:
    """The lines, as `forwardfill import` reads them: ids may hold the other characters that `splitlines` takes for their ends."""
    try:
        with path.open(encoding="utf-8-sig") as file:  # a byte order mark is no part of the first id
            return [line.removesuffix("\n") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
