"""A search explained: its plan, its time step by step, and what exact search of the whole gallery finds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from gallery.search.explain import Explained, Recall, Step, explain
from gallery.search.request import Answer
from gallery.shelves import Shelf
from gallery.snapshot import World
from service.api.search import (
    EXAMPLE,
    REFUSES,
    Found,
    SearchBody,
    Served,
    hits_as_json,
    limit_hits,
    one_query,
    request_for,
    served_as_json,
)
from service.auth import MayWrite
from service.bodies import parsed, validated
from service.documents import documented
from service.errors import InvalidRequest
from service.process import Process, ProcessDep, RequestSlot

router = APIRouter(tags=["search"])
_BASE64 = "base64 of little-endian float32 numbers, in its standard or its URL-safe alphabet, padded or not"
_FROM_URL = str.maketrans("-_ ", "+/+")  # a plus that was not escaped arrives as a space


class ShelfStep(BaseModel):
    """How segments that are alike were searched, as if they were one."""

    segments: list[int]
    route: Literal["direct", "forward", "backward"] | None = Field(
        description="Null where no live item of them can be reached."
    )
    column: str | None = Field(description="The model whose column was searched.")
    transformations: list[str] = Field(
        description="Transformations that mapped its candidates into the score space, in order."
    )
    exhaustive: bool = Field(description="The query is not known in the column's space, so every row was a candidate.")
    index: dict[str, Any] | None = Field(
        description="`kind` of the searched index; of one segment, also its parameters and what was measured of it."
    )
    rows: int
    live: int
    candidates: int = Field(description="Rows that were scored in the score space.")
    ask_ms: float = Field(description="Milliseconds that its index took.")


class PlanAnswer(BaseModel):
    """How the search was done."""

    score_space: str
    query_by: dict[str, str] = Field(description="By model, the transformation that mapped the query into its space.")
    candidates: int = Field(description="Candidates on forward and backward routes.")
    shelves: list[ShelfStep]


class Steps(BaseModel):
    """Milliseconds of each step; the steps do not overlap."""

    plan: float
    filter: float
    ask: float
    transform: float
    score: float
    merge: float


class RecallAnswer(BaseModel):
    """How many of the exact hits the search found, or in place of the last of them others that score the same."""

    hits: int
    found: int
    recall: float | None = Field(description="`found / hits`; null where there was nothing to find.")


class Exact(BaseModel):
    """The same query scored against every live row that can be reached."""

    hits: list[Found]
    recall: RecallAnswer
    by_route: dict[str, RecallAnswer] = Field(
        description="The same, by the route of the segments that hold the exact hits."
    )
    largest_score_difference: float | None = Field(
        description="Over the items that both found; null where there is none."
    )
    took_ms: float


class ExplainAnswer(BaseModel):
    """A search, and how it was done."""

    hits: list[Found]
    served: Served
    took_ms: float = Field(description="The search, without the comparison.")
    plan: PlanAnswer
    milliseconds: Steps
    exact: Exact


@router.post(
    "/galleries/{gallery}/search/explain",
    response_model=ExplainAnswer,
    response_model_exclude_unset=True,
    **documented(*REFUSES, takes=SearchBody, example=EXAMPLE),
)
def explain_search(
    _: MayWrite,
    gallery: str,
    body: Annotated[SearchBody, parsed(SearchBody)],
    process: ProcessDep,
    __: RequestSlot,
) -> dict[str, Any]:
    """Do a search and report how: its plan, the time of each step, and its recall against exact search of the whole gallery.

    The comparison reads and transforms every vector, which may take minutes. So the scope is `write`: a key that may only
    search must not be able to hold up the searches of others. Nothing is changed.
    """
    return _explained(process, gallery, body)


def _from_query(
    model: Annotated[str, Query(description="The model that embedded the query.", examples=["resnet50-v2"])],
    vector: Annotated[str, Query(description=_BASE64, examples=["zczMPc3MTD6amZk-"])],
    companions: Annotated[
        str | None, Query(description=f"A JSON object: by model, the same query as {_BASE64}.")
    ] = None,
    k: Annotated[
        int | None, Query(ge=1, description="Hits; if it is left out, 10 or `max_k`, whichever is less.")
    ] = None,
    filter: Annotated[  # noqa: A002 - the contract's word
        str | None,
        Query(description="Condition on the payload, as JSON; see `POST`.", examples=['{"price": {"lt": 50}}']),
    ] = None,
    allow_partial: Annotated[bool, Query(description="Answer from the segments that can be reached.")] = False,
    oversample: Annotated[
        int | None, Query(ge=1, le=100, description="Candidates per hit that are transformed.")
    ] = None,
) -> SearchBody:
    """The search that the query parameters ask for, judged as its body would be."""
    others = {} if companions is None else _json_object(companions, "companions")
    return validated(
        SearchBody,
        {
            "model": model,
            "vector": _plain_base64(vector),
            "companions": {name: _plain_base64(each) for name, each in others.items()},
            **({} if k is None else {"k": k}),
            "filter": None if filter is None else _json_object(filter, "filter"),
            "allow_partial": allow_partial,
            "oversample": oversample,
        },
    )


@router.get(
    "/galleries/{gallery}/search/explain",
    response_model=ExplainAnswer,
    response_model_exclude_unset=True,
    **documented(*REFUSES),
)
def explain_search_by_url(
    _: MayWrite,
    __: RequestSlot,
    gallery: str,
    body: Annotated[SearchBody, Depends(_from_query)],
    process: ProcessDep,
) -> dict[str, Any]:
    """As `POST`, but as an address that can be saved and shared."""
    return _explained(process, gallery, body)


def _explained(process: Process, gallery: str, body: SearchBody) -> dict[str, Any]:
    limit_hits(body, process)

    def ask(world: World) -> Explained:
        world.snapshot(gallery)  # a gallery that is not there is said before a model that is not
        request = request_for(body, one_query(body, world), slice(None))
        return explain(process.searcher, world, gallery, request)

    found = process.seen(ask)
    payload = "payload" in body.include

    def hits(answer: Answer) -> list[dict[str, Any]]:
        return next(hits_as_json(process, [answer], payload=payload))

    return {
        "hits": hits(found.answer),
        "served": served_as_json(body, found.answer),
        "took_ms": _rounded(sum(found.milliseconds.values())),
        "plan": _plan(found),
        "milliseconds": {step: _rounded(ms) for step, ms in found.milliseconds.items()},
        "exact": {
            "hits": hits(found.exact),
            "recall": _recall(found.total_recall),
            "by_route": {route: _recall(each) for route, each in found.recall.items()},
            "largest_score_difference": found.largest_difference,
            "took_ms": _rounded(found.exact_ms),
        },
    }


def _plan(found: Explained) -> dict[str, Any]:
    return {
        "score_space": found.plan.score_space,
        "query_by": {space: each.name for space, each in found.plan.query_by.items()},
        "candidates": found.candidates,
        "shelves": [_shelf(each) for each in found.steps],
    }


def _shelf(step: Step) -> dict[str, Any]:
    shelf, way = step.shelf, step.way
    return {
        "segments": [view.id for view in shelf.segments],
        "route": None if way is None else way.route,
        "column": None if way is None else way.column,
        "transformations": [] if way is None else [each.name for each in way.by],
        "exhaustive": way is not None and way.exhaustive,
        "index": None if way is None else _index(shelf, way.column),
        "rows": shelf.rows,
        "live": shelf.live,
        "candidates": step.candidates,
        "ask_ms": _rounded(step.ask_ms),
    }


def _index(shelf: Shelf, model: str) -> dict[str, Any]:
    told = shelf.segments[0].columns[model].parameters if len(shelf.segments) == 1 else {}
    return {**told, "kind": shelf.indexes[model].kind}


def _recall(recall: Recall) -> dict[str, Any]:
    return {"hits": recall.hits, "found": recall.found, "recall": recall.share}


def _json_object(text: str, name: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"not JSON: {error}", pointer=f"/{name}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("a JSON object", pointer=f"/{name}")
    return value


def _plain_base64(text: Any) -> Any:
    """Base64 as a body has it; what is no text is left to be refused."""
    if not isinstance(text, str):
        return text
    return text.translate(_FROM_URL).rstrip("=") + "=" * (-len(text.rstrip("=")) % 4)


def _rounded(milliseconds: float) -> float:
    return round(milliseconds, 3)
