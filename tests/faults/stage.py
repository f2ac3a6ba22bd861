"""A stack that runs, and tries upon it: each with a gallery of its own, and a judgement of what is left of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import select

from gallery import verify
from gallery.catalog.fits import fit_row
from gallery.catalog.tables import ColumnRow, EventRow, GalleryRow, SegmentRow
from gallery.catalog.transaction import Catalog
from gallery.faults import VARIABLE
from gallery.files import Files
from tests.acceptance.gallery_world import NEW, World, base64_of
from tests.acceptance.system import Api, Process, Spawn, System, execute, ok, wait_for
from tests.faults.history import violations
from tests.faults.record import ITEMS, Book, Client, Traffic
from tests.faults.servers import Postgres, Redis

SECONDS = 120.0
_ASK_SECONDS = 0.1  # a document is counted from rows each time, on the cores that the worker needs
_REQUESTS = 4
_SETTINGS = {"lease_seconds": "2", "exact_below": "8", "sweep_seconds": "0.2"}
#: an index file for every segment, in which every row is read: so that its making is a step, and its answers are exact
_INDEX = {"kind": "ivf", "nlist": 1, "nprobe": 1}
_numbers = count()


@dataclass
class Judgement:
    """What a try cost; all zeros, or something is wrong."""

    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    why: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.why)


class Stage:
    """One API process that is never harmed, one that may be, and a worker."""

    def __init__(
        self, folder: Path, *, postgres: Postgres | None = None, redis: Redis | None = None, spawn: Spawn = execute
    ) -> None:
        """With neither: SQLite, and messages in files."""
        self.postgres, self.redis = postgres, redis
        self._database = postgres.database(f"faults_{os.getpid()}") if postgres else ""
        self.system = System(
            folder, database_url=self._database, broker_url=redis.url if redis else "", spawn=spawn, **_SETTINGS
        )
        if postgres:
            self.system.migrate()
        self.api: Api = self.system.add_api("--no-worker")
        self.victim: Api = self.system.add_api("--no-worker")
        self.worker: Process = self.system.add_worker()
        self.catalog = Catalog(self._database or f"sqlite:///{self.system.data / 'catalog.sqlite3'}")
        self.files = Files(self.system.data)

    def begin(self) -> Try:
        """A gallery with some items."""
        return Try(self, f"g{next(_numbers)}")

    def restart(self, process: Process, fault: str = "", *, segments_at_once: int = 2) -> None:
        """Kill a process, if it is not dead yet, and start it again, with a fault in its environment."""
        if process.popen.poll() is None:
            process.kill()
        process.environment |= {VARIABLE: fault, "FORWARDFILL_SEGMENTS_AT_ONCE": str(segments_at_once)}
        process.start()

    def died(self, process: Process) -> None:
        """Wait until a fault has killed a process."""
        wait_for(
            lambda: process.popen.poll() is not None, SECONDS, lambda: f"{process.environment[VARIABLE]} never came"
        )
        assert process.popen.poll() == -signal.SIGKILL, process.log.read_text()[-2000:]

    def stopped(self, process: Process) -> None:
        """Wait until a fault has frozen a process."""
        status = Path(f"/proc/{process.popen.pid}/stat")
        wait_for(
            lambda: status.read_text().rpartition(")")[2].split()[0] == "T",
            SECONDS,
            lambda: f"{process.environment[VARIABLE]} never came",
        )

    def mend(self) -> None:
        """Whatever a story that went wrong left behind: begin with whole processes."""
        processes = (self.api, self.victim, self.worker)
        for process in processes:  # all of them first: one that is frozen may hold what another waits for at its start
            process.kill()
        for process in processes:
            self.restart(process)

    def close(self) -> None:
        self.catalog.close()
        for process in (self.worker, *self.system.apis):
            process.kill()
        for api in self.system.apis:
            api.http.close()


class Try:
    """One gallery, what clients did to it, and an upgrade of it."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage = stage
        self.world = World(stage.system.folder / f"{name}.safetensors", name)
        self.world.register(stage.api.http, index=_INDEX)
        self.book = Book(self.world)
        self.client = Client(self.book, stage.api)
        self.upgrade = ""
        #: whether clients may have been left without an answer
        self.interrupted = False
        for at in range(_REQUESTS):
            assert self.client.upsert(ITEMS[at::_REQUESTS]) == "acknowledged"

    # --- an upgrade ---------------------------------------------------------------------------------------------------

    def start(self, **more: Any) -> None:
        """Start an upgrade; a worker takes it from there."""
        body = {"gallery": self.world.gallery, "transformation": self.world.transformation, **more}
        self.upgrade = ok(self.stage.api.http.post("/admin/upgrades", json=body))["id"]

    def probe(self) -> None:
        """Let the upgrade be measured by a query."""
        vectors = {model: base64_of(vector) for model, vector in self.book.queries.items()}
        ok(self.stage.api.http.put(f"/galleries/{self.world.gallery}/probes", json={"probes": [{"vectors": vectors}]}))

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = ok(self.stage.api.http.get(f"/admin/upgrades/{self.upgrade}"))
        return found

    def wait(self, state: str) -> dict[str, Any]:
        """Wait for a state of the upgrade."""
        wait_for(
            lambda: self.document()["state"] == state,
            SECONDS,
            lambda: f"not {state}: {self.document()}",
            every=_ASK_SECONDS,
        )
        return self.document()

    def verb(self, name: str, api: Api | None = None) -> int:
        """Ask for something; the status of the answer."""
        return (api or self.stage.api).http.post(f"/admin/upgrades/{self.upgrade}/{name}").status_code

    # --- a fit --------------------------------------------------------------------------------------------------------

    def fit(self, api: Api) -> dict[str, Any]:
        """Ask for a fit of what a third model makes of some items, as often as one likes.

        Not of the target model: searches on the way there would map by what was fitted, since it was registered last.
        """
        ids, third = ITEMS[:24], f"{self.world.gallery}-third"
        model = {"name": third, "dimension": NEW, "metric": "euclidean", "normalized": False}
        ok(self.stage.api.http.post("/models", json=model))
        vectors = np.random.default_rng(0).normal(size=(len(ids), NEW)).astype(np.float32)
        pairs = [{"id": item, "embedding": base64_of(vector)} for item, vector in zip(ids, vectors, strict=True)]
        body = {"gallery": self.world.gallery, "target": third, "name": self.fitted, "method": "affine"}
        key = {"Idempotency-Key": self.fitted}
        answer: dict[str, Any] = ok(api.http.post("/transformations/fit", json={**body, "pairs": pairs}, headers=key))
        return answer

    @property
    def fitted(self) -> str:
        """Of a transformation that is fitted to this gallery."""
        return f"{self.world.gallery}-fitted"

    def wait_fitted(self, fit: str) -> None:
        """Wait for the end of a fit: its transformation is there, by the artifact that the fit names, and its pairs are gone."""
        http = self.stage.api.http
        done = wait_for(
            lambda: (
                (found := ok(http.get(f"/transformations/fits/{fit}")))["state"] in ("completed", "failed") and found
            ),
            SECONDS,
            lambda: str(ok(http.get(f"/transformations/fits/{fit}"))),
            every=_ASK_SECONDS,
        )
        assert done["state"] == "completed", done["error"]
        registered = ok(http.get(f"/transformations/{self.fitted}"))
        assert registered["artifact"] == done["artifact"], (registered, done)
        assert registered["evaluation"]["fit"] == fit, registered
        assert verify.artifacts(self.stage.catalog, self.stage.files).problems == []
        with self.stage.catalog.reading() as session:
            row = fit_row(session, fit)
            assert (row.ids_file, row.vectors_file) == (None, None)

    # --- what happens meanwhile, and what is left ---------------------------------------------------------------------

    def traffic(self) -> Traffic:
        """Others search and write meanwhile."""
        return Traffic(self.book, self.stage.api, seed=int(self.world.gallery[1:]))

    def derived(self) -> list[ColumnRow]:
        """The columns that an upgrade made."""
        with self.stage.catalog.reading() as session:
            return list(
                session.scalars(
                    select(ColumnRow)
                    .join(SegmentRow)
                    .join(GalleryRow)
                    .where(GalleryRow.name == self.world.gallery, ColumnRow.origin == "derived")
                )
            )

    def native(self) -> list[ColumnRow]:
        """The columns of the items as they came."""
        with self.stage.catalog.reading() as session:
            return list(
                session.scalars(
                    select(ColumnRow)
                    .join(SegmentRow)
                    .join(GalleryRow)
                    .where(GalleryRow.name == self.world.gallery, ColumnRow.origin == "native")
                )
            )

    def repaired(self) -> list[str]:
        """The files that were found damaged and made anew."""
        with self.stage.catalog.reading() as session:
            details = session.scalars(
                select(EventRow.detail).where(
                    EventRow.gallery == self.world.gallery, EventRow.action.endswith(".repaired")
                )
            )
            return [detail["file"] for detail in details]

    def damaged(self) -> list[str]:
        """What `forwardfill verify` says."""
        report = verify.gallery(self.stage.catalog, self.stage.files, self.world.gallery)
        return [f"{problem.file}: {problem.what}" for problem in report.problems]

    def judge(self, *models: str) -> Judgement:
        """Look once more at every process, with every model that is served; then say what is wrong with all of it."""
        with self.stage.catalog.reading() as session:
            version = session.scalars(select(GalleryRow.version).where(GalleryRow.name == self.world.gallery)).one()
        found = Judgement()
        if self.book.failures and not self.interrupted:
            found.why.append(f"{len(self.book.failures)} searches failed, such as {self.book.failures[0]}")
        for api in (self.stage.api, self.stage.victim):
            client = Client(self.book, api)
            for model in models or (self.world.old, self.world.new):
                wait_for(
                    lambda client=client, model=model: (told := client.look(model)) and told.version >= version,
                    SECONDS,
                    lambda: f"version {version} is never seen: {self.book.failures[-1:]}",
                )
        for violation in violations(self.book.writes, self.book.answers):
            found.lost += violation.kind in ("lost", "half")
            found.doubled += violation.kind == "doubled"
            found.wrong += violation.kind not in ("lost", "half", "doubled")
            found.why.append(f"{violation.kind}: {violation.what}")
        found.why += self.damaged()
        return found

    def end(self) -> None:
        """Leave nothing for the next one."""
        self.stage.api.http.delete(f"/galleries/{self.world.gallery}")


@contextmanager
def staged(folder: Path, spawn: Spawn, **servers: Any) -> Iterator[Stage]:
    """A stage, for as long as a block runs."""
    stage = Stage(folder, spawn=spawn, **servers)
    try:
        yield stage
    finally:
        stage.close()


Play = Callable[[Stage, Try], Judgement]
