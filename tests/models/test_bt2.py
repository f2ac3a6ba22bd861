from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from models.method import Batch, Setting
from models.methods.bt2 import Bt2
from tests.models.formulas import Array, numbers, units

ROWS, CLASSES = 24, 4


def rows(old: int = 5, new: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        features=torch.randn(ROWS, old + new, generator=generator),
        old=3 * torch.rand(ROWS, old, generator=generator),
        new=2 * torch.rand(ROWS, new, generator=generator),
        labels=torch.arange(ROWS) % CLASSES,
    )


def method(old: int = 5, new: int = 7, extra: int = 3, **given: float) -> Bt2:
    torch.manual_seed(0)
    fresh = Bt2(Setting(old_dimension=old, new_dimension=new, classes=CLASSES), extra=extra, **given)
    fresh.prepare(rows(old, new))
    return fresh


def cross_entropy(logits: Array, labels: Array) -> float:
    shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(-shares[np.arange(len(labels)), labels].mean())


def stored(bt2: Bt2, features: Array) -> Array:
    """The forward pass of the authors' code, step by step."""
    old, new, extra = bt2.setting.old_dimension, bt2.setting.new_dimension, bt2.extra
    u = units(features[:, :new])
    w = units(np.maximum(features, 0) @ numbers(bt2.to_old.weight).T + numbers(bt2.to_old.bias))
    z = np.concatenate([units(w[:, :extra]), 2 * u @ numbers(bt2.new_basis.weight).T], axis=1)
    b = z[:, :old] @ numbers(bt2.old_basis.weight).T
    return np.concatenate([b, z[:, -(new + extra - old) :]], axis=1)


DIMENSIONS = [(5, 7, 3), (5, 5, 3), (7, 5, 4), (7, 5, 3), (3, 7, 2)]


@pytest.mark.parametrize(("old", "new", "extra"), DIMENSIONS)
def test_what_is_stored_is_the_papers_forward_pass(old: int, new: int, extra: int) -> None:
    bt2, batch = method(old, new, extra), rows(old, new)
    assert batch.features is not None
    np.testing.assert_allclose(
        numbers(bt2.embed(batch.features)), stored(bt2, numbers(batch.features)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["the paper's logits", "scaled"])
def test_the_four_losses_are_the_papers(scale: float) -> None:
    bt2, batch = method(scale=scale), rows()
    features, old, new = numbers(batch.features), units(numbers(batch.old)), units(numbers(batch.new))
    labels = numbers(batch.labels).astype(int)
    u, b = units(features[:, :7]), units(stored(bt2, features)[:, :5])
    prototypes = np.stack([old[labels == k].mean(axis=0) for k in range(CLASSES)])
    expected = {
        "classes": cross_entropy(u @ numbers(bt2.head.weight).T, labels),
        "new": 1 - (u * new).sum(axis=1).mean(),
        "old": 5 * (1 - (b * old).sum(axis=1).mean()),
        "prototypes": 10 * cross_entropy(scale * b @ prototypes.T, labels),
    }
    assert {name: loss.item() for name, loss in bt2.losses(batch).items()} == pytest.approx(expected, rel=1e-4)


def test_the_prototypes_constrain_once_their_logits_are_scaled() -> None:
    """The same vectors, right on their prototypes, cost ln K or nothing."""
    classes, labels = 64, torch.arange(128) % 64
    perfect = torch.eye(classes)[labels]
    batch = Batch(old=perfect, new=perfect, labels=labels)
    setting = Setting(old_dimension=classes, new_dimension=classes, classes=classes)
    scaled, plain = Bt2(setting), Bt2(setting, scale=1.0)
    for bt2 in (scaled, plain):
        bt2.prepare(batch)
    assert F.cross_entropy(scaled.prototypes.logits(perfect), labels) < 1e-6
    assert F.cross_entropy(plain.prototypes.logits(perfect), labels) > 0.75 * np.log(classes)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(DIMENSIONS),
    st.floats(0.1, 5),
    st.floats(1e-3, 1e3),
    st.integers(0, 1000),
)
def test_every_stored_vector_has_the_length_that_c_gives(
    dimensions: tuple[int, int, int], length: float, stretch: float, seed: int
) -> None:
    old, new, extra = dimensions
    bt2 = method(old, new, extra, length=length)
    features = stretch * torch.randn(6, old + new, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        bt2.embed(features).square().sum(dim=1), torch.full((6,), 1 + length**2), rtol=1e-4, atol=0
    )


def test_both_bases_stay_orthogonal_after_each_step() -> None:
    bt2, batch = method(12, 16, 4), rows(12, 16)
    optimizer = torch.optim.Adam(bt2.parameters(), lr=0.05, weight_decay=2**-15)
    before = numbers(bt2.new_basis.weight), numbers(bt2.old_basis.weight)
    for _ in range(20):
        optimizer.zero_grad()
        torch.stack(list(bt2.losses(batch).values())).sum().backward()
        optimizer.step()
        for basis in (bt2.new_basis, bt2.old_basis):
            gram = numbers(basis.weight).T @ numbers(basis.weight)
            np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    for old, basis in zip(before, (bt2.new_basis, bt2.old_basis), strict=True):
        assert np.abs(numbers(basis.weight) - old).max() > 0.1


def test_a_change_of_basis_loses_nothing_between_new_vectors() -> None:
    """Inner products of stored vectors are those of w' and u, whatever P and R are."""
    bt2, batch = method(), rows()
    features = numbers(batch.features)
    w = np.maximum(features, 0) @ numbers(bt2.to_old.weight).T + numbers(bt2.to_old.bias)
    u, w = units(features[:, :7]), units(w[:, :3])
    final = numbers(bt2.embed(torch.from_numpy(features).float()))
    np.testing.assert_allclose(final @ final.T, w @ w.T + 4 * u @ u.T, rtol=1e-4, atol=1e-4)


def test_lengths_of_the_frozen_models_vectors_play_no_part() -> None:
    bt2, batch = method(), rows()
    assert batch.old is not None
    assert batch.new is not None
    other = method()
    longer = replace(batch, old=5 * batch.old, new=0.1 * batch.new)
    other.prepare(longer)
    torch.testing.assert_close(other.losses(longer), bt2.losses(batch))


def test_the_backward_map_takes_the_compatible_dimensions() -> None:
    backward = method().transformations().backward
    assert backward is not None
    vectors = torch.rand(4, 10)
    torch.testing.assert_close(backward(vectors), F.normalize(vectors[:, :5], dim=1))


def test_widths_follow_from_the_setting() -> None:
    assert (method().feature_dimension, method().dimension) == (12, 10)
    assert method(3, 7, 5).dimension == 12  # more dimensions are added than the old model has


def test_what_it_cannot_do_is_named() -> None:
    setting = Setting(old_dimension=8, new_dimension=5, classes=CLASSES)
    for extra in (2, 3):
        with pytest.raises(ValueError, match="extra must be at least 4"):
            Bt2(setting, extra=extra)
    with pytest.raises(ValueError, match="needs `new`"):
        method().prepare(replace(rows(), new=None))
    with pytest.raises(ValueError, match="class 3 has no row"):
        method().prepare(replace(rows(), labels=torch.arange(ROWS) % 3))
    with pytest.raises(ValueError, match="at least two classes"):
        Bt2(replace(setting, classes=1))
