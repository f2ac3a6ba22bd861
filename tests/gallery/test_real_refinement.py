"""An upgraded gallery of real images is embedded again, the least certain first: what each part is worth, as it is measured.

The old model knows half of the classes, the new one all of them; FastFill's map between the two, with side-information, is
trained on images of the training split. Gallery and probes are of the test split.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gallery.catalog import models as model_rows
from gallery.catalog import probes as probe_rows
from gallery.catalog.galleries import gallery_row
from gallery.catalog.models import NewTransformation
from gallery.catalog.upgrades import upgrade_row
from gallery.files import digest
from gallery.transforms import artifact_file
from gallery.upgrade import progress
from gallery.upgrade.refinement import Refinements
from gallery.upgrade.states import State
from models.artifacts import check, save
from models.method import Setting
from models.methods.fastfill import FastFill
from models.plan import transformation_plan
from models.training import train_transformation
from tests.gallery.test_real_chain import WIDTH, opened
from tests.gallery.world import GALLERY, World
from tests.real_data import EMBEDDINGS, needs

PARTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
#: what docs/benchmarks.md tells: CMC-1 and mean average precision over ten hits, by the part that was embedded again
TOLD = {
    "uncertainty": {
        "cmc1": (0.332, 0.380, 0.398, 0.480, 0.520, 0.536),
        "map": (0.151, 0.174, 0.214, 0.272, 0.327, 0.364),
    },
    "random": {
        "cmc1": (0.332, 0.420, 0.438, 0.480, 0.514, 0.536),
        "map": (0.151, 0.174, 0.220, 0.269, 0.316, 0.364),
    },
}

pytestmark = [pytest.mark.slow, needs(EMBEDDINGS)]


@pytest.fixture(scope="module")
def images() -> dict[str, Any]:
    """By model, and `side` and `labels`: what the map is trained on, and the test split."""
    with np.load(EMBEDDINGS, allow_pickle=False) as file:
        return {
            part: {name: file[f"{name}_{part}"][::step].astype(np.float32) for name in ("old", "new", "side")}
            | {"labels": file[f"labels_{part}"][::step].astype(np.int64)}
            for part, step in (("train", 8), ("test", 4))
        }


@pytest.fixture(scope="module")
def artifact(images: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map with an uncertainty head; small, and trained for some seconds."""
    torch.manual_seed(0)
    setting = Setting(old_dimension=WIDTH, new_dimension=WIDTH, side_dimension=WIDTH, metric="cosine")
    method = FastFill(setting, hidden=128)
    train_transformation(method, **images["train"], plan=transformation_plan(len(images["train"]["labels"]), epochs=10))
    module = method.transformations().forward
    assert module is not None
    path = tmp_path_factory.mktemp("fastfill") / "artifact"
    save(path, module)
    return path


@pytest.fixture
def world(artifact: Path, tmp_path: Path) -> Iterator[World]:
    """A gallery in old, and a way to new. Measuring may take all of the time."""
    found = opened(tmp_path / "data")
    found.store = replace(found.store, settings=found.store.settings.model_copy(update={"quality_share": 1.0}))
    found.register("old", WIDTH, "cosine", side_dimension=WIDTH)
    found.register("new", WIDTH, "cosine")
    found.make(GALLERY)
    info = check(artifact)
    stored = found.store.files.path(artifact_file(digest(artifact)))
    stored.parent.mkdir(exist_ok=True)
    shutil.copyfile(artifact, stored)
    with found.store.catalog.transaction() as tx:
        model_rows.add_artifact(tx.session, digest(artifact), size=info.size, architecture=info.declared())
        new = NewTransformation("old-to-new", "old", "new", "forward", "fastfill", digest(artifact))
        model_rows.add_transformation(tx.session, new)
    yield found
    found.close()


def in_order(world: World, upgrade: str, name: str, vectors: Any, side: Any) -> list[int]:
    """Rows in the order in which they are to be embedded again."""
    if name == "random":
        return np.random.default_rng(0).permutation(len(vectors)).tolist()
    with world.store.catalog.reading() as session:
        by = model_rows.as_transformation(upgrade_row(session, upgrade).transformation)
    return np.argsort(-world.store.transforms.uncertainty(by, vectors, side), kind="stable").tolist()


@pytest.mark.parametrize("order", TOLD)
def test_the_curve_over_the_refined_part_rises_to_what_the_new_model_itself_finds(
    world: World, images: dict[str, Any], order: str
) -> None:
    test = images["test"]
    labels, asked = test["labels"], np.arange(0, len(test["labels"]), 5)
    stored = np.setdiff1d(np.arange(len(labels)), asked)
    ids = [f"image-{row}" for row in range(len(stored))]
    world.upsert("old", ids, test["old"][stored], side=test["side"][stored])
    probes = [
        (
            {model: test[model][row] for model in ("old", "new")},
            [ids[at] for at in np.flatnonzero(labels[stored] == labels[row])],
        )
        for row in asked
    ]
    with world.store.catalog.transaction() as tx:
        probe_rows.replace(tx.session, gallery_row(tx.session, GALLERY).id, probes)
    upgrade = world.start("old-to-new")
    assert world.run(upgrade) is State.COMPLETED, world.error(upgrade)

    rows = in_order(world, upgrade, order, test["old"][stored], test["side"][stored])
    worker, done = Refinements(world.store, world.galleries, world.searcher), 0
    for part in PARTS:
        now = rows[done : round(part * len(rows))]
        if now:
            world.upsert("new", [ids[row] for row in now], test["new"][stored[now]])
        done += len(now)
        assert worker.look(upgrade)
    with world.store.catalog.reading() as session:
        curve = progress.quality(upgrade_row(session, upgrade))["by_refinement"]
    assert [point["fraction"] for point in curve] == pytest.approx(PARTS, abs=0.001)
    for name, told in TOLD[order].items():
        assert [point[name] for point in curve] == pytest.approx(told, abs=0.02)
