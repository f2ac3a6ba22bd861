"""JSON of many megabytes, parsed a piece at a time.

orjson holds the interpreter's lock until it is done, so 64 MB of numbers stop every other thread for a quarter of a second,
the event loop too, whichever thread parses. What is large in a large body is one array: its elements are parsed some at a
time, and between two pieces others get their turn.

Where an element ends is not looked for, it is tried. A piece begins where an element begins, so `[piece]` is JSON if and
only if the piece ends between two elements: a cut within a string leaves it open, one within an element a bracket.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

PIECE = 256 * 1024  # bytes, which take less than two milliseconds
#: the body up to its first array, if only plain values come before it: nothing in it can be mistaken for anything else
_HEAD = re.compile(
    rb'\s{0,64}\{\s{0,64}(?:"[^"\\]{0,256}"\s{0,64}:\s{0,64}(?:"[^"\\]{0,512}"|[-+.\w]{1,64})\s{0,64},\s{0,64}){0,16}'
    rb'"([^"\\]{1,256})"\s{0,64}:\s{0,64}\[\s{0,64}'
)
#: by the first byte of an element, how one may end before another comes
_ENDS = {b"{": b"},", b"[": b"],", b'"': b'",'}
#: a name that can be written in one way only, so that it is easy to see whether a body has it
_REST = b"\\u0000"


def loads(raw: bytes, piece: int = PIECE) -> Any:
    """What `orjson.loads` gives; a body that cannot be cut is parsed in one piece.

    Args:
        raw: the whole body.
        piece: bytes that are parsed at a time, at least; 1 or more.

    Raises:
        orjson.JSONDecodeError: it is not JSON.
    """
    head = _HEAD.match(raw)
    end = _ENDS.get(raw[head.end() : head.end() + 1]) if head else None
    if head is None or end is None:
        return orjson.loads(raw)
    try:
        return _in_pieces(raw, head, end, piece)
    except ValueError:  # of which a JSONDecodeError is one; the whole body tells where
        return orjson.loads(raw)


def _in_pieces(raw: bytes, head: re.Match[bytes], end: bytes, piece: int) -> Any:
    """Raises ValueError where the pieces might not be the whole."""
    elements, at = _elements(raw, head.end(), end, piece)
    last = raw[at:]
    if _REST in last:
        raise ValueError("a name like ours")
    before, after = orjson.loads(head[0] + b"]}"), orjson.loads(b'{"%b":[%b' % (_REST, last))
    name, rest = orjson.loads(b'"%b"' % head[1]), after.pop("\0")
    if name in after or (elements and not rest):
        raise ValueError("the array's name is there again, or a comma with nothing behind it")
    return {**before, name: elements + rest, **after}


def _elements(raw: bytes, at: int, end: bytes, piece: int) -> tuple[list[Any], int]:
    """The elements from `at` on, but for the last ones; and where these begin."""
    view, found, size = memoryview(raw), list[Any](), piece
    while (cut := raw.find(end, at + size)) >= 0:
        try:
            found += orjson.loads(b"".join((b"[", view[at : cut + 1], b"]")))
        except orjson.JSONDecodeError:
            size *= 2  # the cut is within an element, or the array ends before it
        else:
            at, size = cut + len(end), piece
    return found, at
