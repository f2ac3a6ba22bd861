"""An experiment on every third of the digits, with networks so small that a method takes seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from models.benchmark.experiment import Experiment
from models.data import digits
from models.encoders import Design
from models.recipes import DIGITS, EncoderRecipe, Recipe


def _small(model: EncoderRecipe, dimension: int, epochs: int) -> EncoderRecipe:
    return replace(model, design=Design(widths=(8, dimension)), plan=replace(model.plan, epochs=epochs))


def small_recipe() -> Recipe:
    return replace(
        DIGITS,
        old=_small(DIGITS.old, 16, 6),
        side=_small(DIGITS.side, 12, 4),
        autoencoder=_small(DIGITS.autoencoder, 12, 1),
        new=_small(DIGITS.new, 24, 6),
        views=1,
        hidden=64,
        forward=replace(DIGITS.forward, epochs=40, batch=64, learning_rate=2e-3),
        compatible=replace(DIGITS.compatible, epochs=4),
        pair_epochs=40,
    )


def small_experiment(folder: Path | None = None) -> Experiment:
    data = digits()
    part = replace(data, test_images=data.test_images[::3], test_labels=data.test_labels[::3])
    return Experiment(recipe=small_recipe(), data=part, folder=folder)
