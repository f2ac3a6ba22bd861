"""A large body is parsed in pieces: to what it is in one piece, and without stopping the other threads."""

from __future__ import annotations

import json
import re
import threading
import time
import tracemalloc
from contextlib import suppress
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gallery.errors import GalleryError, InvalidVector, LimitExceeded
from service.api.galleries import ProbesBody
from service.api.items import ItemsBody
from service.api.search import BatchBody, SearchBody
from service.bodies import Body, parse
from service.errors import InvalidJson, InvalidRequest
from service.pieces import loads

TEXT = st.text(alphabet='a"\\{}[],: \0é', max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, width=16) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
BODIES = st.dictionaries(
    st.sampled_from(["model", "items", "k", "", "\0"]) | TEXT, VALUES | st.lists(VALUES), max_size=4
)


def judged(parse: Any, raw: bytes) -> Any:
    """What comes of a body: its value as text, so that 1 is not True, or that it is refused."""
    try:
        return json.dumps(parse(raw))
    except orjson.JSONDecodeError as error:
        return str(error)


@settings(max_examples=100, deadline=None)
@given(
    body=BODIES, piece=st.integers(1, 12), indent=st.sampled_from([None, 1]), gap=st.sampled_from([",", ", ", " ,\n"])
)
def test_a_body_in_pieces_is_what_it_is_in_one(body: Any, piece: int, indent: int | None, gap: str) -> None:
    raw = json.dumps(body, indent=indent, separators=(gap, ":"), ensure_ascii=False).encode()
    assert judged(lambda raw: loads(raw, piece), raw) == judged(orjson.loads, raw)


@settings(max_examples=100, deadline=None)
@given(body=BODIES, piece=st.integers(1, 12), at=st.floats(0, 1), put=st.sampled_from(["", *'{}[],":\\x1']))
def test_a_broken_body_is_refused_in_the_words_of_one_piece(body: Any, piece: int, at: float, put: str) -> None:
    text = json.dumps(body, separators=(",", ":"))
    cut = int(at * len(text))
    raw = (text[:cut] + put + text[cut + (put == "") :]).encode()
    assert judged(lambda raw: loads(raw, piece), raw) == judged(orjson.loads, raw)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"items":[{"a":1},{"a":2},]}',
        b'{"items":[{"a":1},{"a":2}],"items":[{"a":3}]}',
        b'{"items":[{"a":1},{"a":2}],"\\u0000":[{"a":3}]}',
        b'{"items":"[","items":[{"a":1},{"a":2}],"k":1}',
        b'{"model":"x[{},{}","items":[{"a":"},{"},{"a":[{},{}]},{"a":2}],"k":[1,2]}',
        b'{"items":["a","b\\",","c"],"model":"m"}',
        b'{"queries":[[1,2],[3,[4],[5]],[6]],"k":1}',
        b'{"items":[{"a":1},{"a":2}]} x',
        b'{"items":[{"a":1},{"a":2}]',
    ],
)
def test_what_looks_like_an_end_of_an_element_is_taken_for_what_it_is(raw: bytes) -> None:
    for piece in range(1, 12):
        assert judged(lambda raw, piece=piece: loads(raw, piece), raw) == judged(orjson.loads, raw)


@pytest.mark.parametrize("broken", ["", "NaN", "cut", "comma", "long"])
def test_a_large_body_stops_no_other_thread_for_long(broken: str) -> None:
    """A thread that holds the interpreter's lock stops the event loop as well, so what counts is how long it holds it.

    That is told in its own CPU time, since on a busy machine every thread waits for a core. Another thread that is late
    to ask lengthens it, and nothing shortens it: one good try of several is enough.
    """
    vectors = np.random.default_rng(1).normal(size=(4000, 256)).astype(np.float32)
    items = [{"id": str(at), "embedding": vector.tolist()} for at, vector in enumerate(vectors)]
    raw = good = orjson.dumps({"model": "old", "items": items})
    match broken:
        case "NaN":
            raw = good.replace(b"}]}", b',"side_information":[NaN]}]}')
        case "cut":
            raw = good[:-2]
        case "comma":
            raw = good[:-2] + b",]}"
        case "long":
            raw = orjson.dumps({"model": "old", "vector": vectors.ravel().tolist(), "k": 1})
    started = time.thread_time()
    orjson.loads(good)
    in_one_piece = time.thread_time() - started
    body = SearchBody if broken == "long" else ItemsBody
    assert any(_longest_hold(body, raw) < in_one_piece / 2 for _ in range(8))


def test_a_vector_that_is_longer_than_any_model_has_is_refused_as_such_without_its_numbers() -> None:
    """The text says how long it is, whichever model it is of, and what else is wrong with the body is still seen."""
    body = {"model": "old", "vector": [0.5] * 100_000, "k": 3}
    parsed = parse(SearchBody, orjson.dumps(body), longest=lambda: 8192)
    assert (len(parsed.vector), parsed.k) == (100_000, 3)
    with pytest.raises(InvalidRequest, match="/colour"):
        parse(SearchBody, orjson.dumps({**body, "colour": 1}), longest=lambda: 8192)
    with pytest.raises(InvalidJson):
        parse(SearchBody, orjson.dumps(body)[:-1], longest=lambda: 8192)
    with pytest.raises(InvalidVector, match="/vector: a vector is a list of numbers"):
        parse(SearchBody, orjson.dumps({**body, "vector": [[]] * 100_000}), longest=lambda: 8192)
    assert parse(SearchBody, orjson.dumps(body), longest=lambda: 100_000).vector.tolist() == body["vector"]


@pytest.mark.parametrize("vector", ["[]", '["a"]', '["]", 1]', "[null]", "[NaN, 1]", "[1, NaN]", "[" + " " * 70 + "1]"])
def test_a_large_body_is_judged_as_a_small_one_whatever_its_vector_is(vector: str) -> None:
    """What makes it large stands behind the vector."""

    def judged(padding: int) -> tuple[object, ...]:
        raw = f'{{"vector":{vector},"model":"m","filter":{{"a":"{"x" * padding}"}}}}'.encode()
        try:
            return tuple(parse(SearchBody, raw, longest=lambda: 8192).vector.tolist())
        except GalleryError as error:
            return type(error), str(error).partition(" line ")[0], error.pointer

    assert judged(300_000) == judged(1)


def test_what_is_wrong_with_a_large_body_is_said_as_of_a_small_one() -> None:
    """Its place, and the item's id."""
    items = [{"id": f"item-{at}", "embedding": [0.1, 0.2]} for at in range(20_000)]
    raw = orjson.dumps({"model": "old", "items": items})
    with pytest.raises(InvalidVector) as found:
        parse(ItemsBody, raw[:-4] + b",NaN]}]}")
    assert (found.value.pointer, found.value.details["item"]) == ("/items/19999/embedding/2", "item-19999")
    with pytest.raises(orjson.JSONDecodeError) as whole:
        orjson.loads(raw[:-1])
    with pytest.raises(InvalidJson, match=re.escape(str(whole.value))):
        parse(ItemsBody, raw[:-1])


@pytest.mark.parametrize(
    ("model", "raw"),
    [
        pytest.param(BatchBody, b'{"queries":[%b]}' % b",".join([b"1"] * 200_000), id="elements that are wrong"),
        pytest.param(BatchBody, b'{"queries":[%b]}' % b",".join([b"[]"] * 200_000), id="elements that are too many"),
        pytest.param(SearchBody, b"{%b}" % b",".join(b'"%d":1' % at for at in range(200_000)), id="unknown fields"),
        pytest.param(
            SearchBody,
            b'{"companions":{%b}}' % b",".join(b'"%d":1' % at for at in range(200_000)),
            id="companions",
        ),
        pytest.param(
            ProbesBody,
            b'{"probes":[{"vectors":{"m":[1]},"relevant":[%b]}]}' % b",".join([b"1"] * 200_000),
            id="relevant ids",
        ),
        pytest.param(
            SearchBody,
            b'{"model":"m","vector":[1],"filter":{"a":[%b]}}' % b",".join([b"[[]]"] * 200_000),
            id="parts of a filter",
        ),
    ],
)
def test_what_is_wrong_with_a_body_takes_little_memory_however_often_it_is_wrong(model: type[Body], raw: bytes) -> None:
    """A key with the scope search is enough: of 64 MiB, an error for each element took 40 GB."""
    tracemalloc.start()
    try:
        orjson.loads(raw)
        bare = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        with pytest.raises((InvalidRequest, LimitExceeded)):
            parse(model, raw, limit=lambda _: 1000)
        assert tracemalloc.get_traced_memory()[1] < 2 * bare + 3_000_000
    finally:
        tracemalloc.stop()


def _longest_hold(body: type[ItemsBody | SearchBody], raw: bytes) -> float:
    """CPU seconds of the thread that parses, at most, between two turns of another thread."""
    begin, parsed, leave = threading.Event(), threading.Event(), threading.Event()

    def judge() -> None:
        with suppress(GalleryError):
            parse(body, raw, longest=lambda: 8192)

    parser = threading.Thread(target=lambda: (begin.wait(), judge(), parsed.set(), leave.wait()))
    parser.start()
    clock, turns = time.pthread_getcpuclockid(parser.ident or 0), [0.0]
    begin.set()
    while not parsed.wait(0.0005):  # the lock is let go of, and asked for again
        turns.append(time.clock_gettime(clock))
    turns.append(time.clock_gettime(clock))  # what is refused is refused at the end
    leave.set()
    parser.join()
    return float(np.diff(turns).max())
