"""Whole experiments, stage by stage: old model, side-information model, new model, forward transformation.

A stage is one function, so that a caller can time it, show it, and keep it: see `models.stages`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from models.augmentation import Augmentation
from models.data import Dataset, as_floats, as_tensor, cifar100, digits
from models.encoders import Classifier, Design, Encoder, embed, residual_network
from models.method import Setting
from models.methods.fct import Fct
from models.plan import Plan
from models.stages import Places, Stages, code_of, drawn_from
from models.training import OnStep, train_autoencoder, train_classifier, train_simclr, train_transformation
from models.transformations import Transformation

Floats = npt.NDArray[np.float32]

DATA = ("digits", "cifar100")
VIEW_BATCH = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderRecipe:
    """A backbone and how it is trained."""

    design: Design
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
    #: the other side-information model
    autoencoder: EncoderRecipe
    #: the transformation sees this many views of each training image; the first is the image itself
    views: int
    view: Augmentation
    hidden: int
    forward: Plan
    #: of the new models that are trained to be compatible, from the independent one's weights
    compatible: Plan
    #: of the other maps on pairs
    pair_epochs: int
    #: of torch, while a stage runs; None leaves it as it is
    threads: int | None = None


def train_old(
    recipe: Recipe,
    data: Dataset,
    *,
    seed: int = 0,
    cache: Path | None = None,
    device: str = "cpu",
    on_step: OnStep | None = None,
) -> Classifier:
    """Train the old model, as a classifier of the first classes."""
    part = data.of_classes(recipe.old_classes)
    return _classifier(recipe, "old", recipe.old, part, seed, cache, device, on_step)


def train_new(
    recipe: Recipe,
    data: Dataset,
    *,
    seed: int = 0,
    cache: Path | None = None,
    device: str = "cpu",
    on_step: OnStep | None = None,
) -> Classifier:
    """Train the new model, as a classifier of all classes, untouched by any compatibility term."""
    return _classifier(recipe, "new", recipe.new, data, seed, cache, device, on_step)


def train_side(
    recipe: Recipe,
    data: Dataset,
    *,
    seed: int = 0,
    cache: Path | None = None,
    device: str = "cpu",
    on_step: OnStep | None = None,
) -> Encoder:
    """Train the side-information model by SimCLR: the images the old model saw, without their labels."""
    by = {"temperature": recipe.temperature}
    return _side(recipe, "side", recipe.side, train_simclr, by, data, seed, cache, device, on_step)


def train_autoencoder_side(
    recipe: Recipe,
    data: Dataset,
    *,
    seed: int = 0,
    cache: Path | None = None,
    device: str = "cpu",
    on_step: OnStep | None = None,
) -> Encoder:
    """Train the other side-information model, an autoencoder's encoder, on the images that SimCLR sees."""
    return _side(recipe, "autoencoder", recipe.autoencoder, train_autoencoder, {}, data, seed, cache, device, on_step)


def train_forward(
    recipe: Recipe,
    data: Dataset,
    old: nn.Module,
    side: nn.Module,
    new: nn.Module,
    *,
    seed: int = 0,
    cache: Path | None = None,
    device: str = "cpu",
    on_step: OnStep | None = None,
) -> Transformation:
    """Train FCT's h(old, side) -> new on views of the whole training split, labels unused.

    Args:
        old, side, new: encoders of the recipe's sizes.
    """
    widths = Setting(
        old_dimension=_width(recipe.old), new_dimension=_width(recipe.new), side_dimension=_width(recipe.side)
    )

    def fit(method: Fct, places: Places) -> None:
        olds, sides, news = embedded_views(
            [old, side, new], data, views=recipe.views, view=recipe.view, seed=seed, device=device
        )
        train_transformation(
            method,
            old=olds,
            new=news,
            side=sides,
            plan=recipe.forward,
            seed=seed,
            device=device,
            on_step=on_step,
            **places,
        )

    with drawn_from(seed, recipe.threads):
        depends_on = (recipe, data.digest, seed, torch.device(device).type, code_of(Fct))
        method, _ = Stages(cache).trained("forward", depends_on, lambda: Fct(widths, hidden=recipe.hidden), fit)
    return method.exported()


def embedded_views(
    encoders: list[nn.Module],
    data: Dataset,
    *,
    views: int,
    view: Augmentation,
    seed: int = 0,
    device: str = "cpu",
) -> list[Floats]:
    """Embed several views of each training image by each encoder: what the transformation is trained on.

    All encoders see the same view. They are frozen, so embedding once and keeping the result costs nothing but the
    variety of views.

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
                kept.append(embed(encoder, shown, device=device))
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
    raise ValueError(f"the data set {name!r} is not one of {', '.join(DATA)}")


def _classifier(
    recipe: Recipe,
    role: str,
    model: EncoderRecipe,
    data: Dataset,
    seed: int,
    cache: Path | None,
    device: str,
    on_step: OnStep | None,
) -> Classifier:
    classes = len(data.class_names)

    def make() -> Classifier:
        return Classifier(residual_network(model.design, channels=data.channels), classes)

    def fit(classifier: Classifier, places: Places) -> None:
        train_classifier(
            classifier,
            data.train_images,
            data.train_labels,
            model.plan,
            augmentation=model.augmentation,
            seed=seed,
            device=device,
            on_step=on_step,
            **places,
        )

    depends_on = (recipe.name, data.digest, model, classes, seed, torch.device(device).type)
    with drawn_from(seed, recipe.threads):
        return Stages(cache).trained(role, depends_on, make, fit)[0]


def _side(
    recipe: Recipe,
    role: str,
    model: EncoderRecipe,
    train: Callable[..., object],
    by: Mapping[str, float],
    data: Dataset,
    seed: int,
    cache: Path | None,
    device: str,
    on_step: OnStep | None,
) -> Encoder:
    images = data.of_classes(recipe.old_classes).train_images

    def make() -> Encoder:
        return residual_network(model.design, channels=data.channels)

    def fit(encoder: Encoder, places: Places) -> None:
        how = {"augmentation": model.augmentation, "seed": seed, "device": device, "on_step": on_step}
        train(encoder, images, model.plan, **by, **how, **places)

    depends_on = (recipe.name, data.digest, model, *by.values(), recipe.old_classes, seed, torch.device(device).type)
    with drawn_from(seed, recipe.threads):
        return Stages(cache).trained(role, depends_on, make, fit)[0]


def _width(model: EncoderRecipe) -> int:
    return model.design.dimension or model.design.widths[-1]


_DIGIT_VIEW = Augmentation(min_scale=0.9, max_scale=1.1, shift=0.1, rotation=10, noise=0.02)
_DIGIT_STRONG = Augmentation(
    min_scale=0.7, max_scale=1.15, shift=0.15, rotation=20, stretch=0.3, shear=0.2, light=0.3, noise=0.1
)

DIGITS = Recipe(
    name="digits",
    old_classes=5,
    old=EncoderRecipe(
        design=Design(widths=(8, 16, 128), blocks=1),
        plan=Plan(epochs=30, batch=64, learning_rate=0.1, optimizer="sgd"),
        augmentation=_DIGIT_VIEW,
    ),
    side=EncoderRecipe(
        design=Design(widths=(8, 16, 128), blocks=1),
        plan=Plan(epochs=60, batch=128, learning_rate=2e-3, optimizer="adam"),
        augmentation=_DIGIT_STRONG,
    ),
    new=EncoderRecipe(
        design=Design(widths=(32, 64, 128), blocks=2),
        plan=Plan(epochs=15, batch=64, learning_rate=0.1, optimizer="sgd"),
        augmentation=_DIGIT_VIEW,
    ),
    temperature=0.2,
    autoencoder=EncoderRecipe(
        design=Design(widths=(8, 16, 128)),
        plan=Plan(epochs=60, batch=128, learning_rate=2e-3, optimizer="adam"),
        augmentation=_DIGIT_VIEW,
    ),
    views=3,
    view=_DIGIT_VIEW,
    hidden=2048,
    forward=Plan(epochs=80, batch=256, learning_rate=5e-4, optimizer="adam", schedule="epoch"),
    compatible=Plan(epochs=15, batch=64, learning_rate=1e-3, optimizer="adam"),
    pair_epochs=80,
    # On images this small a second thread gains a quarter. But where another process uses its core, every operation ends
    # with a wait for that thread, which costs tenfold.
    threads=1,
)

_CIFAR_VIEW = Augmentation(shift=0.125, flip=True)

_CIFAR_SMALL = Design(widths=(32, 128), patch=2)

CIFAR100 = Recipe(
    name="cifar100",
    old_classes=50,
    old=EncoderRecipe(
        design=Design(widths=(16, 32, 128)),
        plan=Plan(epochs=24, batch=256, learning_rate=0.2, optimizer="sgd", weight_decay=5e-4, bfloat16=True),
        augmentation=_CIFAR_VIEW,
    ),
    side=EncoderRecipe(
        # without labels there is more to learn: a wider network than the old model's, as the paper has it
        design=Design(widths=(64, 128), patch=2),
        plan=Plan(epochs=20, batch=256, learning_rate=2e-3, optimizer="adam", bfloat16=True),
        augmentation=Augmentation(min_scale=0.4, max_scale=1.0, stretch=0.3, flip=True, light=0.4, grey=0.2),
    ),
    autoencoder=EncoderRecipe(
        design=_CIFAR_SMALL,
        plan=Plan(epochs=10, batch=256, learning_rate=1e-3, optimizer="adam", bfloat16=True),
        augmentation=_CIFAR_VIEW,
    ),
    new=EncoderRecipe(
        design=Design(widths=(64, 128), blocks=2, patch=2),
        plan=Plan(epochs=20, batch=256, learning_rate=0.2, optimizer="sgd", weight_decay=5e-4, bfloat16=True),
        augmentation=_CIFAR_VIEW,
    ),
    temperature=0.2,
    views=2,
    view=_CIFAR_VIEW,
    hidden=2048,
    # The paper's weight decay, 2^-15, keeps h from fitting vectors as small as these (their variance is 0.3 a dimension).
    forward=Plan(
        epochs=16,
        batch=1024,
        learning_rate=5e-4,
        optimizer="adam",
        weight_decay=1e-6,
        schedule="epoch",
        bfloat16=True,
    ),
    compatible=Plan(epochs=6, batch=256, learning_rate=1e-3, optimizer="adam", bfloat16=True),
    pair_epochs=20,
    threads=1,
)

_RESNET_18 = Design(widths=(64, 128, 256, 512), blocks=2, dimension=128)
_RESNET_PLAN = Plan(epochs=100, batch=512, learning_rate=0.4, optimizer="sgd", weight_decay=5e-4, bfloat16=True)

#: CIFAR-100 as the papers train: ResNet-18 for 100 epochs, which is minutes on a GPU and days on a CPU
CIFAR100_CUDA = replace(
    CIFAR100,
    old=EncoderRecipe(design=_RESNET_18, plan=_RESNET_PLAN, augmentation=_CIFAR_VIEW),
    side=replace(
        CIFAR100.side,
        design=_RESNET_18,
        plan=Plan(epochs=100, batch=1024, learning_rate=2e-3, optimizer="adam", bfloat16=True),
    ),
    autoencoder=replace(CIFAR100.autoencoder, design=_RESNET_18, plan=replace(CIFAR100.autoencoder.plan, epochs=50)),
    new=EncoderRecipe(design=_RESNET_18, plan=_RESNET_PLAN, augmentation=_CIFAR_VIEW),
    views=4,
    forward=replace(CIFAR100.forward, epochs=80),
    compatible=replace(CIFAR100.compatible, epochs=100),
    pair_epochs=80,
    threads=None,
)

#: by data set, and by data set and kind of device where a kind has its own
RECIPES: dict[str, Recipe] = {"digits": DIGITS, "cifar100": CIFAR100, "cifar100-cuda": CIFAR100_CUDA}


def recipe_name(data: str, device: str) -> str:
    """Name the recipe for a data set on a device, such as cuda:1: a key of RECIPES.

    Raises:
        ValueError: an unknown data set.
    """
    if data not in DATA:
        raise ValueError(f"the data set {data!r} is not one of {', '.join(DATA)}")
    own = f"{data}-{torch.device(device).type}"
    return own if own in RECIPES else data
