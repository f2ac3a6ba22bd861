from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.captions import Concept, cifar100_concepts
from models.cross_modal import (
    CIFAR100_CAPTIONS,
    DIRECTIONS,
    SHARES,
    CrossModalResult,
    Found,
    Relevance,
    Split,
    Vectors,
    cross_modal_experiment,
    first_hits,
    search,
    slerp,
)
from models.evaluation import evaluate_retrieval
from models.plan import Plan
from tests.real_data import EMBEDDINGS, IMAGES, needs

CONCEPTS = tuple(
    Concept(name, fine, coarse)
    for coarse, classes in {
        "fruit": {"apple": ["apple", "mcintosh"], "pear": ["pear", "anjou"]},
        "vehicles": {"bus": ["bus", "minibus"], "tank": ["tank", "panzer"]},
        "trees": {"oak": ["oak", "cork oak"], "pine": ["pine", "pinon"]},
    }.items()
    for fine, names in classes.items()
    for name in names
)
CLASSES = len(CONCEPTS) // 2
PLAN = Plan(epochs=12, batch=32, learning_rate=5e-3, optimizer="adam")
RECIPE = replace(
    CIFAR100_CAPTIONS,
    old_classes=4,
    old_dimension=8,
    new_dimension=12,
    dual=PLAN,
    projector=replace(PLAN, epochs=30),
    tuning=replace(PLAN, epochs=4, learning_rate=1e-3),
    share=0.5,
    threads=1,
)
ONCE = replace(PLAN, epochs=1)
QUICK = replace(RECIPE, dual=ONCE, projector=ONCE, tuning=ONCE)


def world(rows: int, seed: int) -> Split:
    """Concepts in a hidden space, seen dimly by the old backbone and clearly by the new one."""
    rng = np.random.default_rng(0)
    classes = np.repeat(rng.normal(size=(CLASSES, 16)), 2, axis=0)
    centres = classes + 0.5 * rng.normal(size=(len(CONCEPTS), 16))
    see_old, see_new = rng.normal(size=(16, 10)), rng.normal(size=(16, 20))
    drawn = np.random.default_rng(seed)
    places = np.arange(rows) % len(CONCEPTS)
    hidden = centres[places] + 0.3 * drawn.normal(size=(rows, 16))
    seen = {
        "old": np.tanh((hidden + 0.8 * drawn.normal(size=hidden.shape)) @ see_old / 3),
        "new": np.tanh(hidden @ see_new / 3),
    }
    features = {name: values.astype(np.float32) for name, values in seen.items()}
    return Split(**features, labels=places // 2, concepts=tuple(CONCEPTS[place] for place in places))


TRAIN, TEST = world(480, 1), world(120, 2)


@cache
def result() -> CrossModalResult:
    return cross_modal_experiment(TRAIN, TEST, recipe=RECIPE)


def test_every_system_is_searched_in_every_direction() -> None:
    assert {name: set(found) for name, found in result().found.items()} == {
        name: set(DIRECTIONS)
        for name in (
            "old/old",
            "naive",
            "procrustes",
            "procrustes, slerp",
            "xbt, texts only",
            "xbt",
            "xbt, new items",
            "new/new",
        )
    }
    assert set(result().seconds) == {"old model", "new model", "projector", "tuning"}
    assert all(share in SHARES for share in result().shares.values())


@pytest.mark.parametrize("direction", ["image to text", "text to image"])
def test_a_projector_that_saw_no_image_lets_new_queries_search_old_vectors(direction: str) -> None:
    found = {name: each[direction].by_class for name, each in result().found.items()}
    assert found["naive"] < 0.4  # by chance: 0.17
    assert found["old/old"] < found["new/new"]
    assert found["xbt, texts only"] > found["old/old"]
    assert result().compatible("xbt", direction)
    assert not result().compatible("naive", direction)
    assert found["xbt, new items"] > found["xbt"]


def test_the_same_seed_finds_the_same_and_another_one_something_else() -> None:
    first, again, other = (cross_modal_experiment(TRAIN, TEST, recipe=QUICK, seed=seed) for seed in (3, 3, 4))
    assert again.found == first.found
    assert again.shares == first.shares
    assert other.found != first.found


def test_what_was_trained_is_kept_and_not_trained_again(tmp_path: Path) -> None:
    first = cross_modal_experiment(TRAIN, TEST, recipe=QUICK, cache=tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    again = cross_modal_experiment(TRAIN, TEST, recipe=QUICK, cache=tmp_path)
    assert again == first  # the seconds too: those of the training
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == kept
    cross_modal_experiment(TRAIN, TEST, recipe=replace(QUICK, rank=2), cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(kept) + 1 == 5


def test_each_training_is_announced_in_the_order_of_the_story() -> None:
    told: list[str] = []
    cross_modal_experiment(TRAIN, TEST, recipe=QUICK, on_stage=told.append)
    assert told == ["old model", "new model", "projector", "tuning"]


def test_columns_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="of the same images"):
        replace(TEST, labels=TEST.labels[1:])


def unit(rng: np.random.Generator, rows: int, width: int = 6) -> np.ndarray:
    vectors = rng.normal(size=(rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_a_first_hit_is_the_first_of_the_exhaustive_evaluation(leave_one_out: bool) -> None:
    rng = np.random.default_rng(0)
    queries, gallery, labels = unit(rng, 60), unit(rng, 60), rng.integers(0, 7, 60)
    hits = first_hits(queries, gallery, leave_one_out=leave_one_out)
    expected = evaluate_retrieval(queries, gallery, labels, labels, metric="cosine", leave_one_out=leave_one_out)
    assert (labels[hits] == labels).mean() == pytest.approx(expected.cmc1)


def test_recall_counts_the_queries_that_have_something_to_find() -> None:
    """Three images of two classes: leaving each out, the one of the second class has nothing to find."""
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    both = Vectors(vectors, vectors)
    relevance = Relevance(np.array([0, 0, 1]), np.array([0, 1, 2]))
    found = search(both, both, relevance)
    assert found["image to image"].by_class == 1
    assert np.isnan(found["image to image"].by_concept)
    # An image finds the first of equal captions: that of its class always, that of its concept two times in three.
    assert found["image to text"] == found["text to image"] == Found(1.0, pytest.approx(2 / 3))


@settings(max_examples=30)
@given(st.integers(0, 1_000), st.floats(0, 1))
def test_slerp_goes_its_share_of_the_angle_and_keeps_the_length(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    start, end = unit(rng, 5), unit(rng, 5)
    mixed = slerp(start, end, share)
    angle = np.arccos((start.astype(float) * end).sum(axis=1))
    gone = np.arccos(np.clip((start.astype(float) * mixed).sum(axis=1), -1, 1))
    np.testing.assert_allclose(np.linalg.norm(mixed, axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(gone, share * angle, atol=2e-3)


def test_slerp_between_equal_or_opposite_vectors_stays_where_it_is() -> None:
    start = unit(np.random.default_rng(0), 4)
    for end in (start, -start):
        np.testing.assert_allclose(slerp(start, end, 0.3), start, atol=1e-6)


def real(split: str, every: int) -> Split:
    concepts = cifar100_concepts(IMAGES)[split][::every]
    with np.load(EMBEDDINGS, allow_pickle=False) as files:
        features = {role: files[f"{role}_{split}"][::every].astype(np.float32) for role in ("old", "new")}
        return Split(**features, labels=files[f"labels_{split}"][::every].astype(np.int64), concepts=concepts)


@pytest.mark.slow
@needs(EMBEDDINGS, IMAGES)
def test_a_short_training_on_real_features_beats_the_old_model_in_both_directions() -> None:
    projector = replace(CIFAR100_CAPTIONS.projector, epochs=15)
    recipe = replace(CIFAR100_CAPTIONS, projector=projector, threads=1)
    found = cross_modal_experiment(real("train", 2), real("test", 2), recipe=recipe)
    assert found.compatible("xbt", "image to text")
    assert found.compatible("xbt", "text to image")
    assert not found.compatible("naive", "image to text")
