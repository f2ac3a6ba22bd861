from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models import recipes
from models.data import Dataset, digits
from models.encoders import Encoder, embed
from models.evaluation import cross_test, fraction_closed
from models.plan import Plan
from models.recipes import CIFAR100, DIGITS, RECIPES, EncoderRecipe, Recipe, embedded_views, load_data, recipe_name
from models.runtime import Transform
from models.training import Step


def quick(recipe: Recipe, epochs: int) -> Recipe:
    """The same recipe with less training."""

    def shorter(model: EncoderRecipe) -> EncoderRecipe:
        return replace(model, plan=replace(model.plan, epochs=epochs))

    forward = Plan(epochs=10 * epochs, batch=128, learning_rate=2e-3, optimizer="adam", schedule="epoch")
    models = {"old": shorter(recipe.old), "side": shorter(recipe.side), "new": shorter(recipe.new)}
    return replace(recipe, **models, autoencoder=shorter(recipe.autoencoder), hidden=128, forward=forward)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return digits()


@pytest.fixture(scope="module")
def encoders(data: Dataset) -> tuple[Encoder, Encoder, Encoder]:
    recipe = quick(DIGITS, 3)
    old, new = recipes.train_old(recipe, data), recipes.train_new(recipe, data)
    return old.encoder, recipes.train_side(recipe, data), new.encoder


@pytest.mark.slow
def test_even_a_short_training_upgrades_a_gallery_of_digits(
    data: Dataset, encoders: tuple[Encoder, Encoder, Encoder]
) -> None:
    forward = recipes.train_forward(quick(DIGITS, 3), data, *encoders)
    old, side, new = (embed(encoder, data.test_images) for encoder in encoders)
    before = cross_test(old, old, data.test_labels)
    naive = cross_test(new, old, data.test_labels)
    upgraded = cross_test(new, Transform(forward)(old, side), data.test_labels)
    best = cross_test(new, new, data.test_labels)
    assert naive.map < before.map < upgraded.map
    assert fraction_closed(before.map, upgraded.map, best.map) > 0.5


def test_all_encoders_see_the_same_view_and_the_first_is_the_image_itself(
    data: Dataset, encoders: tuple[Encoder, Encoder, Encoder]
) -> None:
    old, _, new = encoders
    first, again, other = embedded_views([old, old, new], data, views=3, view=DIGITS.view, seed=1)
    assert first.shape == other.shape == (3 * len(data.train_images), 128)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first[: len(data.train_images)], embed(old, data.train_images), rtol=1e-4, atol=1e-5)
    assert not np.allclose(first[: len(data.train_images)], first[len(data.train_images) : 2 * len(data.train_images)])


def test_the_old_and_side_models_see_the_first_classes_only(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    monkeypatch.setattr(recipes, "train_classifier", lambda _, images, *__, **___: seen.update(old=len(images)))
    monkeypatch.setattr(recipes, "train_simclr", lambda _, images, *__, **___: seen.update(side=len(images)))
    monkeypatch.setattr(recipes, "train_autoencoder", lambda _, images, *__, **___: seen.update(other=len(images)))
    recipes.train_old(DIGITS, data)
    recipes.train_side(DIGITS, data)
    recipes.train_autoencoder_side(DIGITS, data)
    half = int((data.train_labels < 5).sum())
    assert seen == {"old": half, "side": half, "other": half}


def test_a_finished_stage_is_kept_and_not_trained_again(data: Dataset, tmp_path: Path) -> None:
    recipe, steps = quick(DIGITS, 1), list[Step]()
    first = recipes.train_old(recipe, data, cache=tmp_path, on_step=steps.append)
    trained = len(steps)
    again = recipes.train_old(recipe, data, cache=tmp_path, on_step=steps.append)
    assert trained > 0
    assert len(steps) == trained
    images = data.test_images[:20]
    np.testing.assert_array_equal(embed(first.encoder, images), embed(again.encoder, images))
    recipes.train_old(recipe, data, seed=1, cache=tmp_path, on_step=steps.append)
    assert len(steps) == 2 * trained
    other = replace(data, train_labels=data.train_labels[::-1].copy())
    recipes.train_old(recipe, other, cache=tmp_path, on_step=steps.append)
    assert len(steps) > 2 * trained
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert not list(tmp_path.glob("*.checkpoint"))


def test_a_stage_that_is_done_anew_begins_a_log_of_its_own(data: Dataset, tmp_path: Path) -> None:
    recipe = quick(DIGITS, 1)
    recipes.train_old(recipe, data, cache=tmp_path)
    (log,), (place,) = tmp_path.glob("*.csv"), tmp_path.glob("*.safetensors")
    lines = len(log.read_text().splitlines())
    place.unlink()
    recipes.train_old(recipe, data, cache=tmp_path)
    assert len(log.read_text().splitlines()) == lines


def test_a_finished_transformation_is_kept(
    data: Dataset, encoders: tuple[Encoder, Encoder, Encoder], tmp_path: Path
) -> None:
    recipe, steps = quick(DIGITS, 1), list[Step]()
    first = recipes.train_forward(recipe, data, *encoders, cache=tmp_path, on_step=steps.append)
    trained = len(steps)
    again = recipes.train_forward(recipe, data, *encoders, cache=tmp_path, on_step=steps.append)
    assert len(steps) == trained > 0
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)


def test_training_leaves_the_callers_random_state_and_threads_alone(data: Dataset) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    recipes.train_old(quick(DIGITS, 1), data)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert torch.get_num_threads() == threads


def test_both_recipes_use_the_papers_transformation() -> None:
    assert set(RECIPES) == {"digits", "cifar100", "cifar100-cuda"}
    assert {recipe_name("cifar100", device) for device in ("cuda", "cuda:0", "cuda:7")} == {"cifar100-cuda"}
    assert (recipe_name("cifar100", "cpu"), recipe_name("digits", "cuda:1")) == ("cifar100", "digits")
    with pytest.raises(ValueError, match="the data set 'mnist' is not one of digits, cifar100"):
        recipe_name("mnist", "cpu")
    for recipe in (DIGITS, CIFAR100):
        assert recipe.hidden == 2048
        assert recipe.forward.learning_rate == 5e-4
        assert recipe.old.design.widths[-1] == recipe.new.design.widths[-1] == 128
    assert (DIGITS.forward.epochs, DIGITS.forward.weight_decay) == (80, 2**-15)
    assert CIFAR100.old_classes == 50


def test_data_sets_are_loaded_by_name(tmp_path: Path) -> None:
    assert len(load_data("digits").class_names) == 10
    with pytest.raises(ValueError, match="give the folder"):
        load_data("cifar100")
    with pytest.raises(ValueError, match="'mnist' is not one of digits, cifar100"):
        load_data("mnist")
    with pytest.raises(FileNotFoundError):
        load_data("cifar100", tmp_path)
