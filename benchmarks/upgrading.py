"""`upgrade`, `workers`, `reembed`: what an upgrade costs, from the request until it is completed and verified."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sqlalchemy import select

from benchmarks import ours
from benchmarks.limits import measured as limiting
from benchmarks.processes import Peak, processor_seconds, worker
from benchmarks.setting import Setting, Skip
from benchmarks.table import Line, Pair, at_least, at_most, compared, counted
from benchmarks.vectors import described
from forwardfill.client import Client
from gallery import columns
from gallery.arrays import Vectors
from gallery.catalog.tables import UpgradeSegmentRow
from gallery.catalog.transaction import Catalog
from gallery.settings import GallerySettings
from models import artifacts
from models.data import cifar100
from models.encoders import Design, embed, residual_network
from workers.settings import WorkerSettings

SMALL, LARGE, SEVERAL = "small", "large", "several"
#: a tenth of the million, and all of it, in segments of one size; and the tenth once more, in so many that two workers share them
SEGMENTS = {SMALL: 2, LARGE: 20, SEVERAL: 8}
PARTS = {SMALL: 0.1, LARGE: 1.0, SEVERAL: 0.1}
ROUNDS = 3
#: segments that a worker transforms or indexes at once
_AT_ONCE = GallerySettings().segments_at_once
#: items of the bare pass beside each upgrade: some seconds of it
SAMPLE = 32_768
IMAGES = 2000


class _Done(NamedTuple):
    """One upgrade."""

    id: str
    seconds_per_item: float
    #: of all processors together, in the worker
    processor_seconds_per_item: float
    #: bytes of the worker's own memory, at the most
    peak: int


class _Passed(NamedTuple):
    """The bare pass beside an upgrade."""

    seconds_per_item: float
    processor_seconds_per_item: float


class _Round(NamedTuple):
    """A tenth of the million, the bare passes, the million, and the bare passes again."""

    small: _Done
    large: _Done
    bare: _Passed
    #: the pass of the network as a worker prepares it
    own: _Passed
    #: as many bare passes at once as a worker makes
    together: _Passed


def measure(setting: Setting) -> Iterator[Line]:
    """A million items, a tenth of them, and the bare forward pass of the same network, in turn."""
    with _filled(setting, (SMALL, LARGE)) as (us, folder, sample):
        bare_pass = _Bare(folder / "forward.safetensors", sample)
        rounds = []
        for _ in range(min(ROUNDS, setting.rounds)):
            with worker(folder / "ours", _settings()) as process:
                small = _upgraded(us.client, SMALL, process.pid)
                before = bare_pass.measured()
                large = _upgraded(us.client, LARGE, process.pid)
            after = bare_pass.measured()
            rounds.append(_Round(small, large, *(_mean(*each) for each in zip(before, after, strict=True))))
            for each in (small, large):
                _roll_back(us.client, each.id)
        yield from _told(setting, rounds, bare_pass.computed_in)
        if bare_pass.device != "cpu":
            yield _limited(folder, rounds, bare_pass)


def _told(setting: Setting, rounds: Sequence[_Round], computed_in: str) -> Iterator[Line]:
    note = (
        f"{setting.million:,} items in {computed_in}; from the request until it is completed, with its indexes built and its "
        "files verified"
    )
    rates = [Pair(1 / each.large.seconds_per_item, 1 / each.bare.seconds_per_item) for each in rounds]
    yield compared("items per second, against a bare forward pass", rates, at_least(0.9), unit="/s", note=note)
    together = [Pair(1 / each.large.seconds_per_item, 1 / each.together.seconds_per_item) for each in rounds]
    note_of_together = f"{_AT_ONCE}, which take all cores, as an upgrade does for all that it does"
    yield compared(
        "the same, against as many passes at once as a worker makes", together, unit="/s", note=note_of_together
    )
    own = [Pair(1 / each.large.seconds_per_item, 1 / each.own.seconds_per_item) for each in rounds]
    note_of_own = "batch norms folded, and where it is bfloat16 weights packed"
    yield compared("the same, against the pass as a worker makes it", own, unit="/s", note=note_of_own)
    processors = [
        Pair(each.large.processor_seconds_per_item * 1e6, each.bare.processor_seconds_per_item * 1e6) for each in rounds
    ]
    note = "of all cores together; what goes beyond the pass is done while it computes"
    yield compared("processor time per item, against the bare pass", processors, unit="µs", note=note)
    grown = [Pair(each.large.seconds_per_item * 1e6, each.small.seconds_per_item * 1e6) for each in rounds]
    what = f"time per item of {setting.million:,} items against a tenth of them"
    yield compared(what, grown, at_most(1.1), unit="µs")
    memory = [Pair(each.large.peak / 1e6, each.small.peak / 1e6) for each in rounds]
    note = "the most that was private in it; mapped files are not its own. The bar is ours: it means independent"
    yield compared("memory of the worker, the same two", memory, at_most(1.2), unit="MB", note=note)


def _limited(folder: Path, rounds: Sequence[_Round], bare_pass: _Bare) -> Line:
    """Where a GPU computes: against the least of what its arithmetic, its memory, the copies and the disk allow."""
    limits = limiting(
        folder / "forward.safetensors", folder, device=bare_pass.device, computed_in=bare_pass.computed_in
    )
    name, least = limits.least
    rates = [Pair(1 / each.large.seconds_per_item, least) for each in rounds]
    allowed = ", ".join(f"{limit.replace('_', ' ')} {rate:,.0f}" for limit, rate in limits._asdict().items())
    note = f"items/s allowed by {allowed}; indexes, which are built by the cores, are in ours"
    return compared(
        f"items per second, against the least limit ({name.replace('_', ' ')})", rates, unit="/s", note=note
    )


def measure_workers(setting: Setting) -> Iterator[Line]:
    """Two workers against one; and whether any item was done twice."""
    with _filled(setting, (SEVERAL,)) as (us, folder, _):
        pairs, twice = [], []
        for _ in range(min(ROUNDS, setting.rounds)):
            took = []
            for count in (1, 2):
                with ExitStack() as stack:
                    for number in range(count):
                        stack.enter_context(worker(folder / "ours", _settings(), number=number))
                    done = _upgraded(us.client, SEVERAL, us.server.pid)
                took.append(1 / done.seconds_per_item)
                twice.append(_done_twice(folder / "ours", done.id))
                _roll_back(us.client, done.id)
            pairs.append(Pair(took[1], took[0]))
        note = (
            f"{int(setting.million * PARTS[SEVERAL]):,} items in {SEGMENTS[SEVERAL]} segments, {os.cpu_count()} cores"
        )
        yield compared("two workers against one, items per second", pairs, unit="/s", note=note)
        yield counted("items done twice", twice, at_most(0))


def measure_reembedding(setting: Setting) -> Iterator[Line]:
    """Upgrade against embedding the same images again, by an encoder as small as they come; decoding is not counted."""
    if setting.root is None or not (setting.root / "cifar100" / "labels.json").is_file():
        raise Skip("it needs images: give --root a folder with cifar100/")
    images = cifar100(setting.root / "cifar100").test_images[: setting.requests(IMAGES)]
    design = Design(widths=(32, 64, 128), blocks=2)
    encoder = residual_network(design, channels=images.shape[1])
    with _filled(setting, (SMALL,)) as (us, folder, _), worker(folder / "ours", _settings()):
        pairs = []
        for _ in range(min(ROUNDS, setting.rounds)):
            done = _upgraded(us.client, SMALL, us.server.pid)
            _roll_back(us.client, done.id)
            started = time.perf_counter()
            embed(encoder, images)
            pairs.append(Pair(1 / done.seconds_per_item, len(images) / (time.perf_counter() - started)))
        note = f"{len(images):,} images of 32 x 32 by a residual network of widths {design.widths}, 2 blocks each"
        yield compared("upgrade against embedding again, items per second", pairs, unit="/s", note=note)


@contextmanager
def _filled(setting: Setting, galleries: tuple[str, ...]) -> Iterator[tuple[ours.Ours, Path, tuple[Vectors, Vectors]]]:
    """A service without a worker, its galleries with all their indexes, and a sample of old vectors and side-information."""
    rows = {name: int(setting.million * PARTS[name]) for name in galleries}
    items, sides = described(max(rows.values()))
    with setting.folder() as folder, ours.running(folder / "ours", ours.AS_WRITTEN, worker=False) as us:
        ours.register(us.client, ours.write_artifact(folder / "forward.safetensors"))
        with worker(folder / "ours", ours.AS_WRITTEN):
            for name, count in rows.items():
                ours.fill(us.client, name, items[:count], sides[:count], segments=SEGMENTS[name])
                ours.wait_indexed(us.client, name)
        sample = slice(0, setting.requests(SAMPLE))
        yield us, folder, (items[sample].copy(), sides[sample].copy())


class _Bare:
    """The forward pass alone, as PyTorch makes it and as a worker does: the same device, number type, threads and blocks."""

    def __init__(self, artifact: Path, sample: tuple[Vectors, Vectors]) -> None:
        self.device = _device()
        self._transform = ours.bare(artifact, sample, self.device)
        self._module = artifacts.load(artifact).eval().to(self.device, getattr(torch, self.computed_in))
        self._blocks = [*zip(*(columns.blocks(each, GallerySettings().block_rows) for each in sample), strict=True)]
        self._items = len(sample[0])

    @property
    def computed_in(self) -> str:
        """The number type of both."""
        return self._transform.computed_in

    def measured(self) -> tuple[_Passed, _Passed, _Passed]:
        """Pass the sample once by PyTorch, once as a worker prepares it, and by PyTorch several blocks at once."""
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            return (
                self._timed(map(self._pass, self._blocks)),
                self._timed(self._transform.each(self._blocks)),
                self._timed(threads.map(self._pass, self._blocks)),
            )

    @torch.inference_mode()
    def _pass(self, block: tuple[Vectors, Vectors]) -> Vectors:
        embeddings, side = (torch.from_numpy(each).to(self.device, getattr(torch, self.computed_in)) for each in block)
        made: Vectors = self._module(embeddings, side).float().cpu().numpy()
        return made

    def _timed(self, passing: Iterable[Vectors]) -> _Passed:
        started, used = time.perf_counter(), time.process_time()
        for _ in passing:
            pass
        seconds, processors = time.perf_counter() - started, time.process_time() - used
        return _Passed(seconds / self._items, processors / self._items)


def _mean(one: _Passed, other: _Passed) -> _Passed:
    return _Passed(*((a + b) / 2 for a, b in zip(one, other, strict=True)))


def _device() -> str:
    """Where the bare pass is computed: on the worker's device. It claims no GPU, since the two take turns."""
    wanted = WorkerSettings().device
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _settings() -> dict[str, object]:
    return {**ours.AS_WRITTEN, **({} if _device() == "cpu" else beside_a_gpu(os.cpu_count() or 1))}


def beside_a_gpu(cores: int) -> dict[str, Any]:
    """The worker's settings where there is a GPU: what goes on beside it is done by the cores, several indexes at once."""
    return {"block_rows": 8192, "segments_at_once": min(64, max(2, cores // 2))}


def _upgraded(client: Client, gallery: str, pid: int) -> _Done:
    """Upgrade a gallery while a process's memory and its use of processors are watched."""
    items, used = client.gallery(gallery)["items"], processor_seconds(pid)
    with Peak(pid) as peak:
        done = ours.upgrade(client, gallery)
    return _Done(done["id"], _seconds(done) / items, (processor_seconds(pid) - used) / items, peak.bytes)


def _seconds(upgrade: dict[str, Any]) -> float:
    """From when it was asked for until it was completed, by the service's own clock."""
    created, finished = (datetime.fromisoformat(upgrade[name]) for name in ("created_at", "finished_at"))
    return (finished - created).total_seconds()


def _roll_back(client: Client, upgrade: str) -> None:
    client.rollback(upgrade)
    client.wait(upgrade, until="rolled_back")


def _done_twice(folder: Path, upgrade: str) -> int:
    """Items of segments that were begun more than once."""
    catalog = Catalog(GallerySettings(data=folder).database)
    try:
        with catalog.reading() as session:
            rows = session.scalars(select(UpgradeSegmentRow).where(UpgradeSegmentRow.upgrade_id == upgrade))
            return sum(row.rows * (row.attempts - 1) for row in rows)
    finally:
        catalog.close()
