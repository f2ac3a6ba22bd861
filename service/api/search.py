"""A search, from JSON to JSON. It takes one snapshot and keeps it; only payloads are read from the database."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import orjson
from fastapi import APIRouter, Response
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, Field, PrivateAttr, WrapValidator
from pydantic import WithJsonSchema as JsonSchema
from starlette.concurrency import run_in_threadpool

from gallery import errors
from gallery.arrays import Vectors
from gallery.catalog import items as item_rows
from gallery.catalog.filters import MOST_CONDITIONS, MOST_DEEP, MOST_VALUES, OPERATORS
from gallery.errors import GalleryError
from gallery.search.brief import AT_MOST, MOST_CANDIDATES, MOST_HITS
from gallery.search.request import Answer, Hit, SearchRequest
from gallery.search.run import ready_plan_for
from gallery.snapshot import World
from gallery.spaces import EmbeddingModel
from gallery.vectors import accept
from service.auth import MaySearch
from service.bodies import VECTOR_SCHEMA, Body, ByModel, Reference, Vector, parsed, read_vector, stack, within
from service.documents import documented
from service.errors import InvalidRequest
from service.process import Process, ProcessDep, SearchSlot

router = APIRouter(tags=["search"])
_DEPTH = 16
_HITS_READ = 1000  # whose payloads are read at once
_MOST_PARTS = 2 * MOST_VALUES  # of a filter, in whichever way: names, operators and values


def _storable(filter_: dict[str, Any]) -> dict[str, Any]:
    """No database is asked for a NUL; and of what is many times too large, no more is looked at than shows it."""
    level: list[Any] = [filter_]
    count = 0
    for _ in range(_DEPTH):
        count += len(level)
        if count > _MOST_PARTS:
            raise ValueError(f"should have at most {MOST_CONDITIONS} conditions and {MOST_VALUES} values")
        if any(isinstance(each, str) and "\0" in each for each in level):
            raise ValueError("should be text without NUL characters")
        level = list(islice(chain.from_iterable(map(_parts, level)), _MOST_PARTS + 1))
    if level:
        raise ValueError("the filter is nested too deep")
    return filter_


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return chain(value.keys(), value.values())
    return value if isinstance(value, list) else ()


_FILTERS = (
    "Condition on the top-level fields of the payload. Each field has a value that it must equal, or an object of operators: "
    f"{', '.join(f'`{each}`' for each in OPERATORS)}. All that is named must hold; `and` and `or` take a list of filters, `not` "
    "takes one. A field that is absent fits only `ne` and `exists: false`. Values of different JSON types are never equal, and "
    f"neither is less than the other. At most {MOST_CONDITIONS} conditions, {MOST_DEEP} filters within each other, and "
    f"{MOST_VALUES} values in the lists of `in`."
)
Filter = Annotated[dict[str, Any], AfterValidator(_storable)]


class _Options(Body):
    """What a search and a batch have in common."""

    model: Reference = Field(description="The model that embedded the query; it is never guessed.")
    k: int = Field(default=10, ge=1, description="Hits per query; if it is left out, 10 or `max_k`, whichever is less.")
    filter: Filter | None = Field(
        default=None,
        description=_FILTERS,
        examples=[
            {"category": "shoes", "price": {"gte": 10, "lt": 50}},
            {"or": [{"category": {"in": ["shoes", "hats"]}}, {"not": {"price": {"exists": True}}}]},
        ],
    )
    include: list[Literal["payload"]] = Field(default_factory=list, max_length=1)
    allow_partial: bool = Field(default=False, description="Answer from the segments that can be reached.")
    oversample: int | None = Field(default=None, ge=1, le=100, description="Candidates per hit that are transformed.")


class SearchBody(_Options):
    """One query."""

    vector: Vector
    companions: ByModel = Field(default_factory=dict, description="The same query embedded by other models.")


class QueryBody(Body):
    """One query of a batch."""

    vector: Vector
    companions: ByModel = Field(default_factory=dict)
    _bare: bool = PrivateAttr(default=False)

    @classmethod
    def of(cls, value: Any, parse: Callable[[Any], QueryBody]) -> QueryBody:
        """A vector alone stands for a query without companions."""
        if isinstance(value, dict):
            return parse(value)
        query = cls.model_construct(vector=read_vector(value))
        query._bare = True
        return query

    def pointer(self, row: int, field: str) -> str:
        """Where in the body a field of this query is; a vector alone has no fields to point at."""
        return errors.pointer("queries", row) if self._bare else errors.pointer("queries", row, field)


_QUERY_SCHEMA = {
    "anyOf": [
        VECTOR_SCHEMA,
        {
            "type": "object",
            "properties": {
                "vector": VECTOR_SCHEMA,
                "companions": {"type": "object", "additionalProperties": VECTOR_SCHEMA},
            },
            "required": ["vector"],
            "additionalProperties": False,
        },
    ]
}


class BatchBody(_Options):
    """Several queries of one model. Either all of them have companions, or none."""

    limits: ClassVar = {"queries": "max_queries"}

    queries: list[Annotated[QueryBody, WrapValidator(QueryBody.of), JsonSchema(_QUERY_SCHEMA)]] = Field(min_length=1)


class Found(BaseModel):
    """One hit."""

    id: str
    score: float
    origin: Literal["native", "derived"] = Field(
        description="Whether the model itself made the vector that was scored."
    )
    payload: dict[str, Any] | None = Field(default=None, description="With `include: [payload]`.")


class Routes(BaseModel):
    """Number of live items, by the route that reached them."""

    direct: int
    forward: int
    backward: int
    unreachable: int


class Served(BaseModel):
    """What the answer is based on: one score space, and one version of the gallery."""

    model: str
    score_space: str
    gallery_version: int
    routes: Routes


class SearchAnswer(BaseModel):
    """The best items, best first; all scores are in the score space."""

    hits: list[Found]
    served: Served
    took_ms: float


class Hits(BaseModel):
    """The hits of one query."""

    hits: list[Found]


class BatchAnswer(BaseModel):
    """The hits of each query, in the order of the queries."""

    results: list[Hits]
    served: Served
    took_ms: float


REFUSES: tuple[type[GalleryError], ...] = (
    errors.GalleryNotFound,
    errors.ModelNotFound,
    errors.NoRoute,
    errors.ModelRetired,
    errors.DimensionMismatch,
    errors.InvalidVector,
    errors.InvalidFilter,
    errors.LimitExceeded,
)
EXAMPLE = {
    "model": "resnet50-v2",
    "vector": [0.1, 0.2, 0.3],
    "companions": {"resnet18-v1": [0.4, 0.5]},
    "k": 10,
    "filter": {"category": "shoes", "price": {"lt": 50}},
    "include": ["payload"],
}
_BATCH = {"model": "resnet50-v2", "queries": [[0.1, 0.2, 0.3], {"vector": [0.4, 0.5, 0.6]}], "k": 10}


@router.post(
    "/galleries/{gallery}/search",
    response_model=SearchAnswer,
    **documented(*REFUSES, takes=SearchBody, example=EXAMPLE),
)
async def search(
    _: MaySearch,
    gallery: str,
    body: Annotated[SearchBody, parsed(SearchBody)],
    process: ProcessDep,
) -> Response:
    """Find the items nearest to a query, at any progress of an upgrade."""
    limit_hits(body, process)
    async with process.searches.taken():
        return await run_in_threadpool(_searched, process, gallery, body)


def brief_request(process: Process, world: World, gallery: str, body: SearchBody) -> tuple[SearchRequest, int] | None:
    """What to ask where a search may begin on the event loop, and how many numbers that reads; None where a thread is better.

    Raises:
        GalleryError: it is refused.
    """
    if body.filter is not None or body.include or body.k > min(MOST_HITS, process.store.settings.max_k):
        return None
    snapshot = world.snapshot(gallery)
    request = request_for(body, one_query(body, world), slice(None))
    work = ready_plan_for(world, snapshot, request).reads
    return None if work is None or work > AT_MOST else (request, work)


def answer_as_json(body: SearchBody, answer: Answer, query: int, started: float) -> bytes:
    """What was found for one of the queries of an answer, without payloads."""
    return orjson.dumps({"hits": _plain(answer, query), **_about(body, answer, started)})


def _searched(process: Process, gallery: str, body: SearchBody) -> Response:
    started = time.perf_counter()
    answers = _answers(process, gallery, body, lambda world: one_query(body, world))
    (hits,) = hits_as_json(process, answers, payload="payload" in body.include)
    return as_json({"hits": hits, **_about(body, answers[0], started)})


@router.post(
    "/galleries/{gallery}/search/batch",
    response_model=BatchAnswer,
    **documented(*REFUSES, takes=BatchBody, example=_BATCH),
)
def search_batch(
    _: MaySearch,
    gallery: str,
    body: Annotated[BatchBody, parsed(BatchBody)],
    process: ProcessDep,
    __: SearchSlot,
) -> Response:
    """Answer several queries of one model from one snapshot."""
    started = time.perf_counter()
    limit_hits(body, process)
    answers = _answers(process, gallery, body, lambda world: _several(body, world))
    found = hits_as_json(process, answers, payload="payload" in body.include)
    # Query by query: a million hits written at once would stop every other thread for as long.
    results, size, most = list[bytes](), 0, process.settings.max_answer_bytes
    for hits in found:
        results.append(_written({"hits": hits}))
        size += len(results[-1])
        if size > most:
            raise errors.LimitExceeded(
                f"the answer would have more than {most} bytes (max_answer_bytes): ask fewer queries at once, or for fewer hits",
                pointer="/queries",
                limit="max_answer_bytes",
                maximum=most,
            )
    about = orjson.dumps(_about(body, answers[0], started))
    return Response(b'{"results":[%b],%b' % (b",".join(results), about[1:]), media_type="application/json")


def limit_hits(body: _Options, process: Process) -> None:
    """Hold `max_k`. Whoever did not ask for a number of hits did not pass it.

    Raises:
        LimitExceeded: more hits are asked for.
    """
    most = process.store.settings.max_k
    if "k" in body.model_fields_set:
        within(body.k, most, "max_k", "/k")
    body.k = min(body.k, most)


class Queries(NamedTuple):
    """The queries as arrays, each (queries, dimension)."""

    vectors: Vectors
    companions: Mapping[str, Vectors]


def one_query(body: SearchBody, world: World) -> Queries:
    """The query of a search; raises what its vectors are refused with."""

    def one(vector: NDArray[Any], model: EmbeddingModel, at: str) -> Vectors:
        return accept(vector.reshape(1, -1), model, pointer=at)

    companions = {}
    for name, vector in body.companions.items():
        at = "/companions/" + errors.escaped(name)
        companions[name] = one(vector, world.model(name, pointer=at), at)
    return Queries(one(body.vector, world.model(body.model, pointer="/model"), "/vector"), companions)


def _several(body: BatchBody, world: World) -> Queries:
    def all_of(vectors: Sequence[NDArray[Any]], model: EmbeddingModel, at: str) -> Vectors:
        return accept(stack(vectors, model.dimension, model.name, at), model, pointer=at)

    names = body.queries[0].companions.keys()
    for row, query in enumerate(body.queries):
        if query.companions.keys() != names:
            raise InvalidRequest(
                "companions come with all queries or with none, in the same models",
                pointer=query.pointer(row, "companions"),
            )
    companions = {}
    for name in names:
        model = world.model(name, pointer=errors.pointer("queries", 0, "companions", name))
        vectors = [query.companions[name] for query in body.queries]
        companions[name] = all_of(vectors, model, "/queries/{row}/companions/" + name)
    model = world.model(body.model, pointer="/model")
    try:
        return Queries(all_of([query.vector for query in body.queries], model, "{row}"), companions)
    except errors.Invalid as error:
        row = int(error.pointer or 0)
        error.pointer = body.queries[row].pointer(row, "vector")
        raise


def _answers(process: Process, gallery: str, body: _Options, queries_of: Callable[[World], Queries]) -> list[Answer]:
    """Search, in as many calls as keep the memory bounded, nearly always one."""

    def ask(world: World) -> list[Answer]:
        world.snapshot(gallery)  # a gallery that is not there is said before a model that is not
        queries = queries_of(world)
        at_once = max(1, MOST_CANDIDATES // (body.k * (body.oversample or process.searcher.oversample)))
        at_once = min(at_once, process.store.settings.max_queries)
        requests = (
            request_for(body, queries, slice(at, at + at_once)) for at in range(0, len(queries.vectors), at_once)
        )
        return [process.coalescer.search(world, gallery, each, at_once=at_once) for each in requests]

    started = time.perf_counter()
    try:
        answers = process.seen(ask)
    except GalleryError:
        process.metrics.counts.ended("refused")
        raise
    except BaseException:
        process.metrics.counts.ended("failed")
        raise
    process.metrics.answered(answers, [time.perf_counter() - started])
    return answers


def request_for(body: _Options, queries: Queries, part: slice) -> SearchRequest:
    """Some of the queries, as the gallery is asked."""
    return SearchRequest(
        model=body.model,
        vectors=queries.vectors[part],
        k=body.k,
        companions={name: vectors[part] for name, vectors in queries.companions.items()},
        filter=body.filter,
        allow_partial=body.allow_partial,
        oversample=body.oversample,
    )


def hits_as_json(process: Process, answers: Sequence[Answer], *, payload: bool) -> Iterator[list[dict[str, Any]]]:
    """The hits of each query, as JSON will have them; those of one query at a time are made.

    Payloads are read as they are needed, each once, so that whoever stops early does not have them all in memory.
    """
    if not payload:
        for answer in answers:
            yield from (_plain(answer, query) for query in range(len(answer.rows)))
        return
    payloads: dict[tuple[int, int], Mapping[str, Any] | None] = {}
    found = _found(answers)
    while group := list(islice(found, max(1, _HITS_READ // max(1, answers[0].rows.shape[1])))):
        if missing := {hit.place for hits in group for hit in hits} - payloads.keys():
            with process.store.catalog.reading() as session:
                payloads |= item_rows.payloads(session, missing)
        for hits in group:
            yield [_with_payload(hit, payloads) for hit in hits]


def _plain(answer: Answer, query: int) -> list[dict[str, Any]]:
    return [{"id": item, "score": score, "origin": origin} for item, score, origin in answer.plain(query)]


def _found(answers: Sequence[Answer]) -> Iterator[list[Hit]]:
    """The hits of each query."""
    return (answer.hits(query) for answer in answers for query in range(len(answer.rows)))


def _with_payload(hit: Hit, payloads: Mapping[tuple[int, int], Mapping[str, Any] | None]) -> dict[str, Any]:
    return {"id": hit.id, "score": hit.score, "origin": hit.origin, "payload": payloads.get(hit.place)}


def _about(body: _Options, answer: Answer, started: float) -> dict[str, Any]:
    return {
        "served": served_as_json(body, answer),
        "took_ms": round((time.perf_counter() - started) * 1000, 3),
    }


def served_as_json(body: _Options, answer: Answer) -> dict[str, Any]:
    """What answered, as JSON will have it."""
    return {
        "model": body.model,
        "score_space": answer.score_space,
        "gallery_version": answer.snapshot.version,
        "routes": answer.coverage._asdict(),
    }


def as_json(answer: dict[str, Any]) -> Response:
    """Written at once: no schema walks over the hits."""
    return Response(_written(answer), media_type="application/json")


def _written(answer: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(answer)
    except orjson.JSONEncodeError:  # a payload that was stored before their depth had a bound; orjson goes 250 deep
        return json.dumps(answer).encode()
