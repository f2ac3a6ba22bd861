"""JSON of many megabytes, parsed a piece at a time.

orjson holds the interpreter's lock until it is done. So 64 MB of numbers stop every other thread, and the event loop, for a
quarter of a second, whichever thread parses. What makes a body large is one array: its elements are parsed some at a time, and
between two pieces other threads get their turn.

The end of an element is found by trying. A piece begins where an element begins, so `[piece]` is JSON if and only if the piece
ends between two elements: a cut within a string leaves the string open, and one within an element leaves a bracket open.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
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


def loads(raw: bytes, piece: int = PIECE, one: Callable[[bytes], Any] = orjson.loads) -> Any:
    """What `orjson.loads` gives; a body that cannot be cut is parsed in one piece.

    Args:
        raw: the whole body.
        piece: bytes that are parsed at a time, at least; 1 or more.
        one: parses a piece. It must refuse what is cut within an element, by a ValueError.

    Raises:
        orjson.JSONDecodeError: it is not JSON; in the words of one piece. Or what `one` raises.
    """
    head = _HEAD.match(raw)
    end = _ENDS.get(raw[head.end() : head.end() + 1]) if head else None
    if head is None or end is None:
        return one(raw)
    try:
        before = one(head[0] + b"]}")
    except ValueError:  # the error is so early that parsing the whole body ends at once
        return one(raw)
    name = _name(head[1])
    elements, at = _elements(raw, head.end(), end, piece, one)
    # The rest of the body is put into an object of its own, and behind an element if there was one before it. The array's
    # name there is random, so that no field after it can have the same.
    ours = secrets.token_hex(16)
    start = b'{"%b":[%b' % (ours.encode(), b"0," if elements else b"")
    try:
        after = one(start + raw[at:])
    except orjson.JSONDecodeError as error:
        raise _moved(error, raw, at, start) from None
    rest = after.pop(ours)[bool(elements) :]
    return {**before, name: elements + rest, **after}  # of two fields with one name, the last counts


def first_array(raw: bytes, name: str) -> int | None:
    """Where the elements of a body's first array begin, if it has this name and only plain values come before it."""
    head = _HEAD.match(raw)
    return head.end() if head and head[1] == name.encode() else None


def _name(written: bytes) -> str:
    name: str = orjson.loads(b'"%b"' % written)
    return name


def _moved(error: orjson.JSONDecodeError, raw: bytes, at: int, start: bytes) -> orjson.JSONDecodeError:
    """The error of the rest, at its place in the whole body."""
    if "UTF-8" in error.msg:  # orjson checks that first, and gives no place
        return orjson.JSONDecodeError(error.msg, "", 0)
    text = raw.decode()
    return orjson.JSONDecodeError(error.msg, text, len(raw[:at].decode()) + error.pos - len(start))


def _elements(raw: bytes, at: int, end: bytes, piece: int, one: Callable[[bytes], Any]) -> tuple[list[Any], int]:
    """The elements from `at` on, except the last ones, and where these begin."""
    view, found, size = memoryview(raw), list[Any](), piece
    while (cut := raw.find(end, at + size)) >= 0:
        try:
            found += one(b"".join((b"[", view[at : cut + 1], b"]")))
        except ValueError:
            size *= 2  # the cut is within an element, or the array ends before it
        else:
            at, size = cut + len(end), piece
    return found, at
