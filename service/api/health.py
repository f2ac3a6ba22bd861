"""Is it alive, is it ready, what are its limits, what are its numbers."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Any, Literal

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from gallery.catalog import upgrades as upgrade_rows
from gallery.catalog.schema import NewerSchemaError, is_current
from gallery.catalog.transaction import in_words
from service.auth import MaySearch
from service.documents import documented, problems
from service.errors import Unavailable
from service.process import Process, ProcessDep

router = APIRouter(tags=["operations"])

# Shorter than the time that probes and Prometheus usually wait, so that they get an answer and do not just run out of time.
_ANSWER_SECONDS = 2.0


class Health(BaseModel):
    """The service is healthy."""

    status: Literal["ok"] = "ok"


class Limits(BaseModel):
    """A request beyond one of these limits is refused with 413 or 422; the answer names the limit."""

    max_body_bytes: int
    max_arrow_bytes: int
    max_artifact_bytes: int
    max_answer_bytes: int
    max_items_per_upsert: int
    max_items_per_arrow: int
    max_fit_pairs: int
    max_k: int
    max_dimension: int
    max_queries: int


class Info(BaseModel):
    """What is running."""

    name: Literal["forwardfill"] = "forwardfill"
    version: str
    limits: Limits


@router.head("/health/live", include_in_schema=False)  # some load balancers send HEAD
@router.get("/health/live")
async def live() -> Health:
    """Whether the process runs; nothing else is checked."""
    return Health()


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready", responses=problems([Unavailable]))
async def ready(process: ProcessDep) -> Health:
    """Whether requests can be served: the catalog answers and has the schema of this version."""
    look = process.looks.recent("/health/ready", 0, lambda: is_current(process.store.catalog))
    try:
        current = await asyncio.wait_for(look, _ANSWER_SECONDS)
    except (SQLAlchemyError, NewerSchemaError) as error:
        raise Unavailable(in_words(error)) from error
    except TimeoutError:
        raise Unavailable(f"the catalog did not answer within {_ANSWER_SECONDS:g} s") from None
    if not current or process.closing:
        raise Unavailable("the catalog has another schema, or the process is being stopped")
    return Health()


@router.get("/info", **documented())
def info(_: MaySearch, process: ProcessDep) -> Info:
    """Version and limits."""
    known = {**process.store.settings.model_dump(), **process.settings.model_dump()}
    return Info(version=version("forwardfill"), limits=Limits(**{name: known[name] for name in Limits.model_fields}))


_TEXT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "In Prometheus's text format.",
        "content": {"text/plain": {"schema": {"type": "string"}, "example": "forwardfill_search_seconds_count 41.0\n"}},
    }
}


@router.get("/metrics", response_class=Response, **documented(answers=_TEXT))
async def metrics(_: MaySearch, process: ProcessDep) -> Response:
    """Metrics for Prometheus: what the service counted, and the present state of galleries and upgrades.

    While the catalog does not answer, they lack what only it knows.
    """
    look = process.looks.recent("/metrics", 0, lambda: _of_the_catalog(process))
    try:
        found = await asyncio.wait_for(look, _ANSWER_SECONDS)
    except (SQLAlchemyError, TimeoutError):
        found = []
    up = GaugeMetricFamily("forwardfill_catalog_up", "Whether the catalog answers.", value=bool(found))
    counted = await run_in_threadpool(_counted, process)
    return Response(counted + generate_latest(_Once([up, *found])), media_type=CONTENT_TYPE_LATEST)


class _Once:
    """Just enough of a registry to write metrics that were counted for this one answer."""

    def __init__(self, found: list[Metric]) -> None:
        self._found = found

    def collect(self) -> list[Metric]:
        return self._found


def _counted(process: Process) -> bytes:
    """What this process counted, and the sizes of the galleries, which every process knows."""
    items = GaugeMetricFamily("forwardfill_gallery_items", "Live items.", labels=["gallery"])
    segments = GaugeMetricFamily("forwardfill_gallery_segments", "Segments.", labels=["gallery"])
    for name, snapshot in process.catch_up.world().galleries.items():
        items.add_metric([name], snapshot.live)
        segments.add_metric([name], len(snapshot.segments))
    return process.metrics.as_text() + generate_latest(_Once([items, segments]))


def _of_the_catalog(process: Process) -> list[Metric]:
    """What is counted from the catalog's rows."""
    done = CounterMetricFamily("forwardfill_upgrade_items", "Items that upgrades transformed.", labels=["gallery"])
    states = GaugeMetricFamily("forwardfill_upgrades", "Upgrades by state, without dry runs.", labels=["state"])
    with process.store.catalog.reading() as session:
        for gallery, count in upgrade_rows.items_transformed(session).items():
            done.add_metric([gallery], count)
        for state, count in upgrade_rows.by_state(session).items():
            states.add_metric([state], count)
    found: list[Any] = [done, states]
    return found
