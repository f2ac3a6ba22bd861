"""The items of one request, and which of them a gallery accepts: their ids, payloads and side-information. Pure.

What is accepted of the vectors themselves, `gallery/vectors.py` says.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gallery import errors
from gallery.arrays import Mask, Rows, Vectors
from gallery.catalog.tables import GalleryRow, UpgradeRow
from gallery.roles import Pinned, Role, lacking
from gallery.spaces import EmbeddingModel
from gallery.vectors import accept, accept_side

MAX_ID_BYTES = 512
#: objects and lists within each other; writers of JSON go 250 deep, so that what is stored can always be answered with
MAX_PAYLOAD_DEPTH = 64
_NO_PATHS = frozenset({".", ".."})


@dataclass(frozen=True, slots=True)
class NewItems:
    """Items of one request, all embedded by one model."""

    model: str
    ids: Sequence[str]
    #: (n, dimension)
    embeddings: np.ndarray[Any, np.dtype[Any]]
    payloads: Sequence[Mapping[str, Any] | None]
    #: (items with side-information, side dimension), in the order of `has_side`
    side: np.ndarray[Any, np.dtype[Any]] | None = None
    #: (n,) which items have side-information; None means all or none, as `side` says
    has_side: Mask | None = None


@dataclass(frozen=True, slots=True)
class AcceptedItems:
    """A request that was checked, and where it goes."""

    gallery: GalleryRow
    model: EmbeddingModel
    items: NewItems
    embeddings: Vectors
    side: Vectors | None
    has_side: Mask

    def uniform(self) -> Iterator[Rows]:
        """The rows of each new segment: with side-information, and without."""
        for rows in (np.flatnonzero(self.has_side), np.flatnonzero(~self.has_side)):
            if rows.size:
                yield rows


def accept_items(gallery: GalleryRow, model: EmbeddingModel, items: NewItems) -> AcceptedItems:
    """Check the items of a request; the vectors come back in the model's convention.

    Raises:
        Invalid: an item cannot be stored; the pointer names it.
    """
    if not items.ids:
        raise errors.InvalidItem("there are no items; send at least one", pointer="/items")
    _accept_ids(items.ids)
    _accept_payloads(items.payloads)
    if not len(items.ids) == len(items.embeddings) == len(items.payloads):
        raise errors.InvalidItem("every item has an id, an embedding and a payload or null", pointer="/items")
    embeddings = accept(items.embeddings, model, pointer="/items/{row}/embedding")
    _fits_storage(gallery, embeddings, "/items/{row}/embedding", nonzero=model.metric == "cosine")
    n = len(items.ids)
    has_side = items.has_side if items.has_side is not None else np.full(n, items.side is not None)
    side = None
    if items.side is not None:
        if model.side_dimension is None:
            raise errors.DimensionMismatch(
                f"{model.name} was registered without side-information, but these items have some",
                pointer=f"/items/{int(np.argmax(has_side))}/side_information",
            )
        if len(items.side) != np.count_nonzero(has_side):
            raise errors.InvalidItem("side-information and the items that have it differ in number", pointer="/items")
        side = _accept_side_of(items.side, model.side_dimension, has_side)
        _fits_storage(gallery, side, "/items/{row}/side_information")
    return AcceptedItems(gallery, model, items, embeddings, side, has_side)


def joined(requests: Sequence[AcceptedItems]) -> AcceptedItems:
    """Requests as one: of one gallery and one model, no id in two of them."""
    first, *others = requests
    if not others:
        return first
    sides = [each.side for each in requests if each.side is not None]
    side = np.concatenate(sides) if sides else None
    embeddings = np.concatenate([each.embeddings for each in requests])
    has_side = np.concatenate([each.has_side for each in requests])
    ids = [item for each in requests for item in each.items.ids]
    payloads = [payload for each in requests for payload in each.items.payloads]
    items = NewItems(first.model.name, ids, embeddings, payloads, side, has_side)
    return AcceptedItems(first.gallery, first.model, items, embeddings, side, has_side)


def accept_for_upgrades(accepted: AcceptedItems, role: Role, stack: Sequence[UpgradeRow], pinned: Pinned) -> None:
    """Refuse items without side-information that an open upgrade would fail on.

    Args:
        accepted: the items.
        role: what the upgrades want of them.
        stack: the open upgrades, each on top of the one before it.
        pinned: their transformations.

    Raises:
        MissingSideInformation: an upgrade needs it, and these items have none of its width.
    """
    for rows in accepted.uniform():
        side = accepted.model.side_dimension if accepted.has_side[rows[0]] else None
        upgrade = lacking(role, accepted.model, side, stack, pinned)
        if upgrade is not None:
            needed = [each for each in pinned[upgrade.id] if each.side_dimension is not None]
            by, width = (
                (needed[0].name, needed[0].side_dimension) if needed else (upgrade.transformation.name, "another")
            )
            raise errors.MissingSideInformation(
                f"{by}, which upgrades this gallery, needs side-information of dimension {width}: send it, or embed the item "
                f"with {upgrade.target.name}",
                pointer=f"/items/{int(rows[0])}/side_information",
            )


def _fits_storage(gallery: GalleryRow, vectors: Vectors, pointer: str, *, nonzero: bool = False) -> None:
    """Refuse vectors that float16 cannot hold: large numbers become infinity, and very small ones zero, without a direction."""
    if gallery.storage_dtype != "float16":
        return
    largest = np.abs(vectors).max(axis=1)
    if (large := largest > np.finfo(np.float16).max).any():
        raise errors.InvalidVector(
            f"{gallery.name} stores float16, whose largest number is 65504",
            pointer=pointer.format(row=int(np.argmax(large))),
        )
    if nonzero and (small := largest.astype(np.float16) == 0).any():
        raise errors.InvalidVector(
            f"{gallery.name} stores float16, in which this vector is zero: send it at unit length",
            pointer=pointer.format(row=int(np.argmax(small))),
        )


def _accept_side_of(side: np.ndarray[Any, np.dtype[Any]], dimension: int, has_side: Mask) -> Vectors:
    """Check side-information; the pointer counts in items, not in items that have some."""
    try:
        return accept_side(side, dimension, pointer="{row}")
    except errors.Invalid as error:
        item = int(np.flatnonzero(has_side)[int(error.pointer or 0)])
        raise type(error)(str(error), pointer=f"/items/{item}/side_information") from error


def _accept_ids(ids: Sequence[str]) -> None:
    seen: set[str] = set()
    for at, item in enumerate(ids):
        if not item or len(item.encode(errors="surrogatepass")) > MAX_ID_BYTES or not _is_text(item):
            raise errors.InvalidItem(
                f"an id is 1 to {MAX_ID_BYTES} bytes of text without control characters", pointer=f"/items/{at}/id"
            )
        if item in _NO_PATHS:
            raise errors.InvalidItem(
                "clients take '.' and '..' out of paths: choose another id", pointer=f"/items/{at}/id"
            )
        if item in seen:
            raise errors.DuplicateId(f"the id {item!r} occurs twice in this request", pointer=f"/items/{at}/id")
        seen.add(item)


def _is_text(item: str) -> bool:
    """No control characters, no lone surrogates. All else is somebody's writing, whether or not this Python knows it yet."""
    return item.isprintable() or not any(unicodedata.category(character) in ("Cc", "Cs") for character in item)


def _accept_payloads(payloads: Sequence[Mapping[str, Any] | None]) -> None:
    for at, payload in enumerate(payloads):
        if payload and not _storable(payload, MAX_PAYLOAD_DEPTH):
            raise errors.InvalidItem(
                f"a payload is JSON, nested at most {MAX_PAYLOAD_DEPTH} deep, without NaN, infinity, NUL characters or lone "
                "surrogates",
                pointer=f"/items/{at}/payload",
            )


def _storable(value: Any, depth: int) -> bool:
    """What both databases can keep, and answers can hold: PostgreSQL's JSONB refuses NUL, and JSON itself NaN."""
    if isinstance(value, str):
        return ("\0" not in value and value.isascii()) or not any("\ud800" <= c <= "\udfff" or c == "\0" for c in value)
    if isinstance(value, int | float):
        return abs(value) <= sys.float_info.max  # a larger integer would break every filter on its field
    if isinstance(value, Mapping):
        return depth > 0 and all(_storable(key, 0) and _storable(inner, depth - 1) for key, inner in value.items())
    if isinstance(value, list):
        return depth > 0 and all(_storable(inner, depth - 1) for inner in value)
    return True
