"""A chain of three networks on real images: a direct transformation of native vectors against two in a row, both searched.

The first network was trained without labels (SimCLR), the second with the labels of half the classes, the third with all; none
is made from another. Maps are fitted on items of the training split, galleries and queries are of the test split.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery.catalog import models as model_rows
from gallery.catalog.models import NewTransformation
from gallery.catalog.schema import migrate
from gallery.search.mapped import MappedColumns
from gallery.transforms import Transforms, artifact_file
from gallery.upgrade import lifecycle
from gallery.upgrade.states import State
from models.artifacts import save
from models.evaluation import cross_test
from models.method import Setting
from models.methods.affine import Affine
from models.runtime import Transform, load_transform
from models.training import train_transformation
from tests.gallery.chain import columns, digests
from tests.gallery.world import GALLERY, World
from tests.real_data import EMBEDDINGS, needs

WIDTH = 128
#: the models, by the names that the file has for them
CHAIN = ("side", "old", "new")

#: what docs/benchmarks.md tells
TOLD = {"before": 0.144, "composed": 0.273, "direct": 0.320}

pytestmark = [pytest.mark.slow, needs(EMBEDDINGS)]


def opened(folder: Path) -> World:
    """A process whose transformations are those of the library."""
    world = World.open(folder)
    migrate(world.store.catalog)
    transforms = Transforms(world.store.files, partial(load_transform, device="cpu"))
    searcher = replace(world.searcher, transforms=transforms, mapped=MappedColumns(transforms, 1 << 24))
    return World(replace(world.store, transforms=transforms), world.galleries, searcher)


def fitted(world: World, pairs: Any, source: str, target: str) -> Transform:
    """Fit a map from one model to another, and register it under both names."""
    method = Affine(Setting(old_dimension=WIDTH, new_dimension=WIDTH, metric="cosine"))
    train_transformation(method, old=pairs[source], new=pairs[target])
    module = method.transformations().forward
    assert module is not None
    files = world.store.files
    part = files.path("incoming")
    sha256 = save(part, module)
    files.path(artifact_file(sha256)).parent.mkdir(exist_ok=True)
    part.rename(files.path(artifact_file(sha256)))
    architecture = {"source_dimension": WIDTH, "target_dimension": WIDTH}
    new = NewTransformation(f"{source}-to-{target}", source, target, "forward", "affine", sha256)
    with world.store.catalog.transaction() as tx:
        model_rows.add_artifact(tx.session, sha256, size=1, architecture=architecture)
        model_rows.add_transformation(tx.session, new)
    return Transform(module)


def upgraded(world: World, transformation: str) -> str:
    """An upgrade that is completed."""
    upgrade = world.start(transformation)
    assert world.run(upgrade) is State.COMPLETED, world.error(upgrade)
    return upgrade


def cmc1(world: World, model: str, queries: Any, labels: Any) -> float:
    """How often the first hit of an item's query, but for the item itself, has its label."""
    answer = world.search(model, queries, k=2)
    first = [next(int(hit.id) for hit in answer.hits(at) if int(hit.id) != at) for at in range(len(queries))]
    return float(np.mean(labels[first] == labels))


def test_direct_is_better_than_composed_and_is_preferred(tmp_path: Path) -> None:
    with np.load(EMBEDDINGS, allow_pickle=False) as file:
        shown = {model: file[f"{model}_train"][::8].astype(np.float32) for model in CHAIN}
        test = {model: file[f"{model}_test"][::4].astype(np.float32) for model in CHAIN}
        labels = file["labels_test"][::4]
    world = opened(tmp_path / "data")
    for model in CHAIN:
        world.register(model, WIDTH, "cosine")
    world.make(GALLERY, model="side")
    world.upsert("side", [str(item) for item in range(len(labels))], test["side"])
    first, second = fitted(world, shown, "side", "old"), fitted(world, shown, "old", "new")
    measured = {"before": cmc1(world, "side", test["side"], labels)}

    upgraded(world, "side-to-old")
    upgrade = upgraded(world, "old-to-new")
    assert columns(world)[1]["new"] == ("side-to-old", "old-to-new")
    measured["composed"] = cmc1(world, "new", test["new"], labels)

    lifecycle.rollback(world.store, upgrade)
    before = digests(world)
    direct = fitted(world, shown, "side", "new")
    upgrade = upgraded(world, "old-to-new")  # preferred without being asked for
    assert columns(world)[1]["new"] == ("side-to-new",)
    measured["direct"] = cmc1(world, "new", test["new"], labels)
    lifecycle.rollback(world.store, upgrade)
    assert digests(world) == before
    world.close()

    mapped = {"before": test["side"], "composed": second(first(test["side"])), "direct": direct(test["side"])}
    own = {"before": test["side"]}
    expected = {
        name: cross_test(own.get(name, test["new"]), vectors, labels, metric="cosine").cmc1
        for name, vectors in mapped.items()
    }
    assert measured == pytest.approx(expected, abs=0.005)
    assert measured == pytest.approx(TOLD, abs=0.01)
