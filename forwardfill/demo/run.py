"""The main job on real images: train two models and what carries one to the other, fill a gallery, upgrade it in use.

Every number that is shown is taken from answers of the running service, as any client could take it.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from forwardfill.answers import Throttle, Upgrade
from forwardfill.client import Client
from forwardfill.demo import report
from forwardfill.demo.quality import Exam, GalleryMovedError, Measurement, Queries, fraction_of
from forwardfill.demo.story import NEW, OLD, SEGMENTS, Items, Scale, Story
from forwardfill.demo.traffic import Plan, Traffic, TrafficStoppedError
from forwardfill.errors import ForwardfillError, UpgradeStoppedError
from forwardfill.following import RESTING
from forwardfill.local_service import LocalService, ServiceDiedError
from models import recipes
from models.artifacts import save
from models.data import Dataset
from models.encoders import Encoder, embed
from models.recipes import RECIPES, EncoderRecipe, Recipe
from models.training import OnStep, progress_bar

Floats = npt.NDArray[np.float32]
T = TypeVar("T")

FORWARD = "old-to-new"
GALLERY, REEMBEDDED = "photos", "photos-reembedded"
TENTHS = 10
K = 10
FIRST_SEARCHES = 20
MARGIN = 1.25
MOST_SECONDS = 45.0
PATIENCE = 300.0

console = Console()


# For mAP a fixed sample of the queries is enough: each asks for a ranking of the whole gallery.
SCALES = {
    "digits": Scale(whole_queries=200),
    "cifar100": Scale(whole_queries=500, seconds=60.0, cached=True),
}


class Trained(NamedTuple):
    """What training made."""

    items: Items
    new: Encoder
    artifact: Path


def run(
    *,
    data: str = "digits",
    root: Path | None = None,
    out: Path = Path("build/demo"),
    seed: int = 0,
    quick: bool = False,
) -> int:
    """Do the whole job and report it.

    Args:
        data: `digits`, which is bundled, or `cifar100`.
        root: the folder of CIFAR-100.
        out: where report, picture, log and the service's data go; earlier ones there are replaced.
        seed: of all training.
        quick: train and measure hardly anything, to see in a minute that all of it runs.

    Returns:
        The exit code: 0 if every search was answered rightly, 130 after Ctrl-C.
    """
    began = time.monotonic()
    try:
        with _terminable():
            story = _tell(data, root, out, seed, quick)
    except KeyboardInterrupt:
        console.print("[red]Stopped; the processes that this started are stopped too.[/red]")
        return 130
    except (ValueError, FileNotFoundError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 2
    except (
        ServiceDiedError,
        TrafficStoppedError,
        UpgradeStoppedError,
        ForwardfillError,
        GalleryMovedError,
        TimeoutError,
        httpx.HTTPError,
    ) as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
        return 1
    title = f"{data}: {len(story.items.ids):,} items upgraded in place"
    return report.tell(console, story, out, title=title, seconds=time.monotonic() - began)


def _tell(data: str, root: Path | None, out: Path, seed: int, quick: bool) -> Story:
    """The story, in five chapters."""
    _chapter(1, f"Images: {data}")
    images = recipes.load_data(data, root)
    recipe, scale = RECIPES[data], SCALES[data]
    if quick:
        images, recipe, scale = _quick(images, recipe)
    _clear(out)
    _chapter(2, f"Training on {len(images.train_images):,} images")
    trained = _train(recipe, images, out, seed=seed, cache=out / "cache" / data if scale.cached else None)
    story = Story(trained.items, scale)
    _chapter(3, "The service and its worker, as processes of their own")
    items = len(trained.items.ids)
    # Segments are not merged, because each step of the picture is one upgraded segment.
    settings = {"MAX_K": max(1000, items), "COMPACT_SEGMENTS": 0}
    with (
        LocalService(out / "data", out / "service.log", settings) as service,
        Client(service.url, timeout=PATIENCE) as client,
        _explained(service),
    ):
        _register(client, trained)
        _fill(client, GALLERY, OLD, story.items, story.items.old, side=story.items.side)
        console.print(f"  {items:,} items in {client.gallery(GALLERY)['segments']} segments, served on {service.url}")
        _chapter(4, "The upgrade, under searches")
        _upgrade_in_use(client, service, story, out)
        _chapter(5, "The same without the throttle, and by re-embedding")
        _compare(client, story, trained.new)
    return story


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM do what Ctrl-C does, so that the processes that were started are stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _explained(service: LocalService) -> Iterator[None]:
    """If a connection breaks because the service died, raise that instead, with the end of its log."""
    try:
        yield
    except (httpx.TransportError, TrafficStoppedError):
        service.check()
        raise


# --- training ---------------------------------------------------------------------------------------------------------


def _train(recipe: Recipe, images: Dataset, out: Path, *, seed: int, cache: Path | None) -> Trained:
    """Old model, side-information and new model, then the transformation; the test split is embedded by all three."""
    old = _stage("old model", lambda on: recipes.train_old(recipe, images, seed=seed, cache=cache, on_step=on))
    side = _stage("side-information", lambda on: recipes.train_side(recipe, images, seed=seed, cache=cache, on_step=on))
    new = _stage("new model", lambda on: recipes.train_new(recipe, images, seed=seed, cache=cache, on_step=on))
    forward = _stage(
        "transformation",
        lambda on: recipes.train_forward(
            recipe, images, old.encoder, side, new.encoder, seed=seed, cache=cache, on_step=on
        ),
    )
    artifact = out / f"{FORWARD}.safetensors"
    save(artifact, forward)
    order = np.random.default_rng(seed).permutation(len(images.test_labels))
    shown = images.test_images[order]
    items = Items(
        ids=tuple(f"test-{at:05d}" for at in order),
        labels=images.test_labels[order],
        images=shown,
        old=embed(old.encoder, shown),
        side=embed(side, shown),
        new=embed(new.encoder, shown),
    )
    return Trained(items, new.encoder, artifact)


def _stage(title: str, train: Callable[[OnStep], T]) -> T:
    with progress_bar(f"  {title:<16}") as on_step:
        return train(on_step)


def _quick(images: Dataset, recipe: Recipe) -> tuple[Dataset, Recipe, Scale]:
    """The same with hardly any images, epochs and searches."""
    train, test = (
        np.random.default_rng(0).permutation(len(labels))[:200] for labels in (images.train_labels, images.test_labels)
    )
    images = replace(
        images,
        train_images=images.train_images[train],
        train_labels=images.train_labels[train],
        test_images=images.test_images[test],
        test_labels=images.test_labels[test],
    )
    recipe = replace(
        recipe,
        old=_shortened(recipe.old),
        side=_shortened(recipe.side),
        new=_shortened(recipe.new),
        forward=replace(recipe.forward, epochs=20, batch=64),
        hidden=128,
    )
    return images, recipe, Scale(short_queries=100, whole_queries=50, searches=100, seconds=4.0)


def _shortened(encoder: EncoderRecipe) -> EncoderRecipe:
    return replace(encoder, plan=replace(encoder.plan, epochs=6))


# --- the service ------------------------------------------------------------------------------------------------------


def _register(client: Client, trained: Trained) -> None:
    """Both models and the transformation. FCT is trained on distances, so both spaces are Euclidean."""
    items = trained.items
    client.register_model(OLD, dimension=items.old.shape[1], metric="euclidean", side_dimension=items.side.shape[1])
    client.register_model(NEW, dimension=items.new.shape[1], metric="euclidean")
    artifact = client.upload_artifact(trained.artifact)
    client.register_transformation(FORWARD, source=OLD, target=NEW, method="fct", artifact=artifact)


def _fill(client: Client, gallery: str, model: str, items: Items, vectors: Floats, side: Floats | None = None) -> None:
    client.create_gallery(gallery, model)
    client.upsert(gallery, model, ids=items.ids, embeddings=vectors, side_information=side, batch=items.batch)


def _exam(client: Client, items: Items, scale: Scale) -> Exam:
    """Fixed samples of the queries; the one for mAP lies within the one for CMC-1."""
    order = np.random.default_rng(0).permutation(len(items.ids))
    return Exam(client, items.ids, items.labels, short=order[: scale.short_queries], whole=order[: scale.whole_queries])


# --- the upgrade ------------------------------------------------------------------------------------------------------


def _upgrade_in_use(client: Client, service: LocalService, story: Story, out: Path) -> None:
    """Measure, upgrade and measure, while another process searches from before the start until after the end."""
    items, exam = story.items, _exam(client, story.items, story.scale)
    queries = out / "queries.npz"
    np.savez(queries, ids=np.array(items.ids), old=items.old, new=items.new)
    plan = Plan(
        url=service.url, gallery=GALLERY, items=len(items.ids), old_model=OLD, new_model=NEW, k=K, queries=str(queries)
    )
    before = _answers(client, items)
    with Traffic(plan, out / "traffic.json") as traffic:
        traffic.wait_for(FIRST_SEARCHES, timeout=PATIENCE)
        story.measured["old_old"] = exam.take(GALLERY, items.old_queries)
        story.measured["new_old_naive"] = exam.take(GALLERY, items.naive_queries)
        story.by_progress.append(exam.take(GALLERY, items.new_queries))
        _say(story.by_progress[-1], traffic)
        story.upgrade = _watch(client, exam, story, traffic)
        traffic.wait_for(len(traffic) + FIRST_SEARCHES, timeout=PATIENCE)
        traffic.stop()
    story.searches = list(traffic.records)
    story.measured["new_upgraded"] = story.by_progress[-1]
    client.rollback(story.upgrade["id"])
    after = _answers(client, items)
    story.undone = len(before), sum(one == other for one, other in zip(before, after, strict=True))


def _watch(client: Client, exam: Exam, story: Story, traffic: Traffic) -> Upgrade:
    """Run the upgrade to its end, and measure at each tenth of it."""
    pace = _Pace(client, story, traffic)
    throttle: Throttle = {"items_per_second": pace.items_per_second}
    upgrade = client.start_upgrade(GALLERY, transformation=FORWARD, throttle=throttle)
    columns = (TextColumn("  upgrade"), BarColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, closing(client.events(upgrade["id"])) as events:
        bar, measured = progress.add_task("upgrade", total=1.0, said=""), 0
        for _ in events:
            traffic.check()
            upgrade = client.upgrade(upgrade["id"])
            said = f"{upgrade['state']}, {len(traffic):,} searches, {traffic.failed} failed"
            progress.update(bar, completed=upgrade["progress"]["fraction"], said=said)
            if upgrade["state"] in RESTING:
                raise UpgradeStoppedError(upgrade)
            reached = _tenths(client, story.items, upgrade)
            if reached > measured:
                measured = reached
                story.by_progress.append(_measure(client, exam, story, upgrade["id"], pausing=pace.pausing))
                _say(story.by_progress[-1], traffic)
                pace.keep(upgrade["id"], reached)
            if measured == TENTHS:
                return upgrade
    raise ServiceDiedError("the events of the upgrade ended before the upgrade did")


def _tenths(client: Client, items: Items, upgrade: Upgrade) -> int:
    """How many tenths serve already; the last one counts once the upgrade is verified and completed."""
    if upgrade["state"] == "completed":
        return TENTHS
    answer = client.search(GALLERY, NEW, items.new[0], companions={OLD: items.old[0]}, k=1)
    half_a_segment = 0.5 / SEGMENTS
    return min(TENTHS - 1, int((fraction_of(answer["served"]["routes"]) + half_a_segment) * TENTHS))


def _measure(client: Client, exam: Exam, story: Story, upgrade_id: str, *, pausing: bool) -> Measurement:
    """Measure one version of the gallery; if it changes before that is done, pause the upgrade and measure again."""
    queries = story.items.new_queries
    if not pausing:
        try:
            return exam.take(GALLERY, queries, attempts=2)
        except GalleryMovedError:
            pass
    if not _paused(client, upgrade_id):
        return exam.take(GALLERY, queries)  # the upgrade is done, so the gallery changes no more
    try:
        story.pauses += 1
        return exam.take(GALLERY, queries)  # the segment under way may still be published, once
    finally:
        client.resume(upgrade_id)


def _paused(client: Client, upgrade_id: str) -> bool:
    """Pause the upgrade, unless it is too far for that."""
    try:
        client.pause(upgrade_id)
    except ForwardfillError as error:
        if error.code == "invalid_state_transition":
            return False
        raise
    return True


class _Pace:
    """Chooses how slow the upgrade must be for its middle to be measured and enough searches to be sent."""

    def __init__(self, client: Client, story: Story, traffic: Traffic) -> None:
        self._client = client
        self._story = story
        self._traffic = traffic
        self._first = len(traffic)
        self._start = time.monotonic()
        records = traffic.records
        rate = len(records) / max(1e-3, time.time() - records[0].at)  # while quality was measured, as it will be again
        scale = story.scale
        measuring, searching = story.by_progress[0].seconds, MARGIN * scale.searches / rate
        fitting = MARGIN * SEGMENTS * measuring
        #: whether each measurement needs a pause, since it takes longer than the time between two segments
        self.pausing = fitting > MOST_SECONDS
        if self.pausing:
            seconds = max(scale.seconds, searching - (TENTHS - 1) * measuring)
        else:
            seconds = max(scale.seconds, searching, fitting)
        self.items_per_second = len(story.items.ids) / seconds

    def keep(self, upgrade_id: str, tenth: int) -> None:
        """Go slower if too few searches would be answered by the end."""
        left = 1 - tenth / TENTHS
        sent = len(self._traffic) - self._first
        wanted = MARGIN * self._story.scale.searches - sent
        if left <= 0 or wanted <= 0 or sent == 0:
            return
        seconds = wanted * (time.monotonic() - self._start) / sent
        slower = left * len(self._story.items.ids) / seconds
        if slower < 0.8 * self.items_per_second:
            self.items_per_second = slower
            self._client.set_throttle(upgrade_id, {"items_per_second": slower})


# --- after it ---------------------------------------------------------------------------------------------------------


def _answers(client: Client, items: Items) -> list[Any]:
    """What some queries of the old model find, with scores."""
    return client.search_batch(GALLERY, OLD, items.old[:1000], k=K)["results"]


def _compare(client: Client, story: Story, new: Encoder) -> None:
    """The seconds of the upgrade at full speed, and of embedding the same images again, without searches meanwhile."""
    upgrade = client.start_upgrade(GALLERY, transformation=FORWARD)
    story.unthrottled = client.wait(upgrade["id"], timeout=PATIENCE)
    start = time.perf_counter()
    vectors = embed(new, story.items.images)
    embedded = time.perf_counter()
    _fill(client, REEMBEDDED, NEW, story.items, vectors)
    story.reembedding = embedded - start, time.perf_counter() - embedded
    exam = _exam(client, story.items, story.scale)
    story.measured["new_new"] = exam.take(REEMBEDDED, Queries(NEW, vectors, {}))


# --- talk -------------------------------------------------------------------------------------------------------------


def _chapter(number: int, title: str) -> None:
    console.print(f"[bold]{number}/5  {title}[/bold]", highlight=False)


def _say(measured: Measurement, traffic: Traffic) -> None:
    console.print(
        f"  {measured.fraction:4.0%} upgraded   CMC-1 {measured.quality.cmc1:6.2%}   mAP {measured.quality.map:6.2%}   "
        f"{len(traffic):,} searches, {traffic.failed} failed",
        highlight=False,
    )


def _clear(out: Path) -> None:
    """Start from nothing, except for finished training stages."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "data", ignore_errors=True)
    for name in ("report.json", "quality.png", "service.log", "traffic.json", "queries.npz"):
        (out / name).unlink(missing_ok=True)
