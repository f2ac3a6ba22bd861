"""`upgrade`, `workers`, `reembed`: what an upgrade costs, from the request until it is completed and verified."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import select

from benchmarks import ours
from benchmarks.processes import Peak, worker
from benchmarks.setting import Setting, Skip
from benchmarks.table import Line, Pair, at_least, at_most, compared, counted
from benchmarks.vectors import clustered
from forwardfill.client import Client
from gallery.arrays import Vectors
from gallery.catalog.tables import UpgradeSegmentRow
from gallery.catalog.transaction import Catalog
from gallery.settings import GallerySettings
from models.data import cifar100
from models.encoders import Design, embed, residual_network
from models.runtime import load_transform

SMALL, LARGE = "small", "large"
#: a tenth of the million, and all of it, in segments of one size
SEGMENTS = {SMALL: 2, LARGE: 20}
ROUNDS = 3
#: items of the bare pass beside each upgrade: some seconds of it
SAMPLE = 32_768
IMAGES = 2000


class _Done(NamedTuple):
    """One upgrade."""

    id: str
    seconds_per_item: float
    #: bytes of the worker's own memory, at the most
    peak: int


def measure(setting: Setting) -> Iterator[Line]:
    """A million items, a tenth of them, and the bare forward pass of the same network, in turn."""
    with _filled(setting, (SMALL, LARGE)) as (us, folder, sample):
        bare_pass = _Bare(folder / "forward.safetensors", sample)
        rounds = []
        for _ in range(min(ROUNDS, setting.rounds)):
            with worker(folder / "ours", ours.AS_WRITTEN) as process:
                small = _upgraded(us.client, SMALL, process.pid)
                bare = bare_pass.seconds_per_item()
                large = _upgraded(us.client, LARGE, process.pid)
            rounds.append((small, bare, large))
            for each in (small, large):
                _roll_back(us.client, each.id)
        note = f"{setting.million:,} items; from the request until it is completed, with its indexes built and its files verified"
        rates = [Pair(1 / large.seconds_per_item, 1 / bare) for _, bare, large in rounds]
        yield compared("items per second, against a bare forward pass", rates, at_least(0.9), unit="/s", note=note)
        grown = [Pair(large.seconds_per_item * 1e6, small.seconds_per_item * 1e6) for small, _, large in rounds]
        what = f"time per item of {setting.million:,} items against a tenth of them"
        yield compared(what, grown, at_most(1.1), unit="µs")
        memory = [Pair(large.peak / 1e6, small.peak / 1e6) for small, _, large in rounds]
        note = "the most that was private in it; mapped files are not its own. The bar is ours: it means independent"
        yield compared("memory of the worker, the same two", memory, at_most(1.2), unit="MB", note=note)


def measure_workers(setting: Setting) -> Iterator[Line]:
    """Two workers against one; and whether any item was done twice."""
    with _filled(setting, (SMALL,)) as (us, folder, _):
        pairs, twice = [], []
        for _ in range(min(ROUNDS, setting.rounds)):
            took = []
            for count in (1, 2):
                with ExitStack() as stack:
                    for number in range(count):
                        stack.enter_context(worker(folder / "ours", ours.AS_WRITTEN, number=number))
                    done = _upgraded(us.client, SMALL, us.server.pid)
                took.append(1 / done.seconds_per_item)
                twice.append(_done_twice(folder / "ours", done.id))
                _roll_back(us.client, done.id)
            pairs.append(Pair(took[1], took[0]))
        yield compared("two workers against one, items per second", pairs, unit="/s")
        yield counted("items done twice", twice, at_most(0))


def measure_reembedding(setting: Setting) -> Iterator[Line]:
    """Upgrade against embedding the same images again, by an encoder as small as they come; decoding is not counted."""
    if setting.root is None or not (setting.root / "cifar100" / "labels.json").is_file():
        raise Skip("it needs images: give --root a folder with cifar100/")
    images = cifar100(setting.root / "cifar100").test_images[: setting.requests(IMAGES)]
    design = Design(widths=(32, 64, 128), blocks=2)
    encoder = residual_network(design, channels=images.shape[1])
    with _filled(setting, (SMALL,)) as (us, folder, _), worker(folder / "ours", ours.AS_WRITTEN):
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
    rows = {name: setting.million * count // SEGMENTS[LARGE] for name, count in SEGMENTS.items()}
    data = clustered(max(rows[name] for name in galleries))
    sides = np.random.default_rng(1).standard_normal(data.items.shape, dtype=np.float32)
    with setting.folder() as folder, ours.running(folder / "ours", ours.AS_WRITTEN, worker=False) as us:
        ours.register(us.client, ours.write_artifact(folder / "forward.safetensors"))
        with worker(folder / "ours", ours.AS_WRITTEN):
            for name in galleries:
                count = rows[name]
                ours.fill(us.client, name, data.items[:count], sides[:count], segments=SEGMENTS[name])
                ours.wait_indexed(us.client, name)
        sample = slice(0, setting.requests(SAMPLE))
        yield us, folder, (data.items[sample].copy(), sides[sample].copy())


class _Bare:
    """The forward pass alone: the same network, number type, threads and blocks as the worker's."""

    def __init__(self, artifact: Path, sample: tuple[Vectors, Vectors]) -> None:
        self._transform = load_transform(artifact)
        self._sample = sample

    def seconds_per_item(self) -> float:
        started = time.perf_counter()
        self._transform(*self._sample)
        return (time.perf_counter() - started) / len(self._sample[0])


def _upgraded(client: Client, gallery: str, pid: int) -> _Done:
    """Upgrade a gallery while a process's memory is watched."""
    items = client.gallery(gallery)["items"]
    with Peak(pid) as peak:
        done = ours.upgrade(client, gallery)
    return _Done(done["id"], _seconds(done) / items, peak.bytes)


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
