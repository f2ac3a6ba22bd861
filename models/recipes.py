"""Whole experiments, stage by stage: old model, side-information model, new model, forward transformation.

A stage is one function, so that a caller can time it, show it, and keep it: with a `cache` folder a finished stage is a
safetensors file there, named by everything it depends on, and a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from models.artifacts import load, save
from models.augmentation import Augmentation
from models.data import Dataset, as_floats, as_tensor, cifar100, digits
from models.encoders import Encoder, embed, residual_network
from models.method import Setting
from models.methods.fct import Fct
from models.plan import Plan
from models.training import OnStep, train_classifier, train_simclr, train_transformation
from models.transformations import Transformation

Floats = npt.NDArray[np.float32]

VIEW_BATCH = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderRecipe:
    """A backbone and how it is trained."""

    widths: tuple[int, ...]
    blocks: int
    plan: Plan
    augmentation: Augmentation


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One upgrade: an old model of the first classes, a new model of all, and what carries one to the other."""

    name: str
    #: the old model and the side-information model see the images of this many classes only
    old_classes: int
    old: EncoderRecipe
    side: EncoderRecipe
    new: EncoderRecipe
    #: of SimCLR
    temperature: float
    #: the transformation sees this many views of each training image; the first is the image itself
    views: int
    view: Augmentation
    hidden: int
    forward: Plan
    #: of torch, while a stage runs; None leaves it as it is
    threads: int | None = None


def train_old(
    recipe: Recipe, data: Dataset, *, seed: int = 0, cache: Path | None = None, on_step: OnStep | None = None
) -> Encoder:
    """Train the old model, as a classifier of the first classes."""
    part = data.of_classes(recipe.old_classes)
    return _classifier(recipe, "old", recipe.old, part, seed=seed, cache=cache, on_step=on_step)


def train_new(
    recipe: Recipe, data: Dataset, *, seed: int = 0, cache: Path | None = None, on_step: OnStep | None = None
) -> Encoder:
    """Train the new model, as a classifier of all classes, untouched by any compatibility term."""
    return _classifier(recipe, "new", recipe.new, data, seed=seed, cache=cache, on_step=on_step)


def train_side(
    recipe: Recipe, data: Dataset, *, seed: int = 0, cache: Path | None = None, on_step: OnStep | None = None
) -> Encoder:
    """Train the side-information model by SimCLR: the images the old model saw, without their labels."""
    part = data.of_classes(recipe.old_classes)

    def fit(encoder: Encoder) -> None:
        train_simclr(
            encoder,
            part.train_images,
            recipe.side.plan,
            augmentation=recipe.side.augmentation,
            temperature=recipe.temperature,
            seed=seed,
            on_step=on_step,
        )

    place = _place(cache, "side", recipe.name, recipe.side, recipe.temperature, recipe.old_classes, seed)
    return _encoder(recipe, recipe.side, part.channels, fit, seed=seed, place=place)


def train_forward(
    recipe: Recipe,
    data: Dataset,
    old: Encoder,
    side: Encoder,
    new: Encoder,
    *,
    seed: int = 0,
    cache: Path | None = None,
    on_step: OnStep | None = None,
) -> Transformation:
    """Train FCT's h(old, side) -> new on views of the whole training split, labels unused."""
    place = _place(cache, "forward", recipe, seed)
    if place is not None and place.exists():
        return load(place)
    with _stage(recipe, seed):
        olds, sides, news = embedded_views([old, side, new], data, views=recipe.views, view=recipe.view, seed=seed)
        widths = Setting(old_dimension=old.dimension, new_dimension=new.dimension, side_dimension=side.dimension)
        method = Fct(widths, hidden=recipe.hidden)
        train_transformation(method, old=olds, new=news, side=sides, plan=recipe.forward, seed=seed, on_step=on_step)
    if place is not None:
        save(place, method.transformation)
    return method.transformation.requires_grad_(False)


def embedded_views(
    encoders: list[Encoder], data: Dataset, *, views: int, view: Augmentation, seed: int = 0
) -> list[Floats]:
    """Embed several views of each training image by each encoder: what the transformation is trained on.

    All encoders see the same view. They are frozen, so embedding once and keeping the result costs nothing but the
    variety of views (the shortcut of methods.md, section 3.1).

    Returns:
        Per encoder (views * n, dimension); the first n rows are the images as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    images = as_tensor(data.train_images)
    parts: list[list[Floats]] = [[] for _ in encoders]
    for turn in range(views):
        for start in range(0, len(images), VIEW_BATCH):
            shown = as_floats(images[start : start + VIEW_BATCH])
            shown = view(shown, generator) if turn else shown
            for encoder, kept in zip(encoders, parts, strict=True):
                kept.append(embed(encoder, shown))
    return [np.concatenate(kept) for kept in parts]


def load_data(name: str, root: str | Path | None = None) -> Dataset:
    """Load a recipe's data set by name.

    Args:
        name: `digits`, which is bundled, or `cifar100`.
        root: the folder of CIFAR-100.

    Raises:
        ValueError: an unknown name, or no folder where one is needed.
    """
    if name == "digits":
        return digits()
    if name == "cifar100" and root is not None:
        return cifar100(root)
    if name == "cifar100":
        raise ValueError("cifar100 is not bundled: give the folder that holds it")
    raise ValueError(f"the data set {name!r} is not one of {', '.join(RECIPES)}")


def _classifier(
    recipe: Recipe,
    role: str,
    model: EncoderRecipe,
    data: Dataset,
    *,
    seed: int,
    cache: Path | None,
    on_step: OnStep | None,
) -> Encoder:
    classes = len(data.class_names)

    def fit(encoder: Encoder) -> None:
        train_classifier(
            encoder,
            data.train_images,
            data.train_labels,
            model.plan,
            classes=classes,
            augmentation=model.augmentation,
            seed=seed,
            on_step=on_step,
        )

    place = _place(cache, role, recipe.name, model, classes, seed)
    return _encoder(recipe, model, data.channels, fit, seed=seed, place=place)


def _encoder(
    recipe: Recipe,
    model: EncoderRecipe,
    channels: int,
    fit: Callable[[Encoder], None],
    *,
    seed: int,
    place: Path | None,
) -> Encoder:
    """Take a finished encoder from its place, or make, fit and keep it."""
    with _stage(recipe, seed):
        encoder = residual_network(channels=channels, widths=model.widths, blocks=model.blocks)
        if place is not None and place.exists():
            encoder.load_state_dict(load_file(place))
        else:
            fit(encoder)
            if place is not None:
                _keep(encoder, place)
    return encoder.eval().requires_grad_(False)


def _keep(encoder: Encoder, place: Path) -> None:
    """Write a finished stage whole or not at all: a killed run must not find half of one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_suffix(".unfinished")
    save_file({name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, beside)
    beside.replace(place)


def _place(cache: Path | None, role: str, *depends_on: object) -> Path | None:
    """Name a stage's file by what it depends on. Recipes are frozen dataclasses, so their text tells all of it."""
    if cache is None:
        return None
    key = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
    return Path(cache) / f"{role}-{key}.safetensors"


@contextmanager
def _stage(recipe: Recipe, seed: int) -> Iterator[None]:
    """Draw fresh weights from a seed on the recipe's threads, and leave the caller's random state and threads alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads or threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


_DIGIT_VIEW = Augmentation(min_scale=0.9, max_scale=1.1, shift=0.1, rotation=10, noise=0.02)
_DIGIT_STRONG = Augmentation(
    min_scale=0.7, max_scale=1.15, shift=0.15, rotation=20, stretch=0.3, shear=0.2, light=0.3, noise=0.1
)

DIGITS = Recipe(
    name="digits",
    old_classes=5,
    old=EncoderRecipe(
        widths=(8, 16, 128),
        blocks=1,
        plan=Plan(epochs=30, batch=64, learning_rate=0.1, optimizer="sgd"),
        augmentation=_DIGIT_VIEW,
    ),
    side=EncoderRecipe(
        widths=(8, 16, 128),
        blocks=1,
        plan=Plan(epochs=60, batch=128, learning_rate=2e-3, optimizer="adam"),
        augmentation=_DIGIT_STRONG,
    ),
    new=EncoderRecipe(
        widths=(32, 64, 128),
        blocks=2,
        plan=Plan(epochs=15, batch=64, learning_rate=0.1, optimizer="sgd"),
        augmentation=_DIGIT_VIEW,
    ),
    temperature=0.2,
    views=3,
    view=_DIGIT_VIEW,
    hidden=2048,
    forward=Plan(epochs=80, batch=256, learning_rate=5e-4, optimizer="adam", schedule="epoch"),
    # A second thread gains a quarter on images this small, and where another process wants its core, waiting for it
    # at the end of every operation costs tenfold.
    threads=1,
)

_CIFAR_VIEW = Augmentation(shift=0.125, flip=True)

CIFAR100 = Recipe(
    name="cifar100",
    old_classes=50,
    old=EncoderRecipe(
        widths=(16, 32, 128),
        blocks=1,
        plan=Plan(epochs=12, batch=256, learning_rate=0.2, optimizer="sgd", weight_decay=5e-4, bfloat16=True),
        augmentation=_CIFAR_VIEW,
    ),
    side=EncoderRecipe(
        widths=(16, 32, 128),
        blocks=1,
        plan=Plan(epochs=12, batch=256, learning_rate=2e-3, optimizer="adam", bfloat16=True),
        augmentation=Augmentation(min_scale=0.4, max_scale=1.0, stretch=0.3, flip=True, light=0.4, grey=0.2),
    ),
    new=EncoderRecipe(
        widths=(32, 64, 128),
        blocks=2,
        plan=Plan(epochs=8, batch=256, learning_rate=0.2, optimizer="sgd", weight_decay=5e-4, bfloat16=True),
        augmentation=_CIFAR_VIEW,
    ),
    temperature=0.2,
    views=1,
    view=_CIFAR_VIEW,
    hidden=2048,
    forward=Plan(epochs=20, batch=1024, learning_rate=5e-4, optimizer="adam", schedule="epoch"),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (DIGITS, CIFAR100)}
