from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from models.method import Batch, Setting
from models.methods.oca import Oca
from models.training import CompatibleTraining
from tests.models.formulas import Array, numbers, units

ROWS, OLD, EXTRA, CLASSES = 24, 6, 3, 4


def rows() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        features=torch.randn(ROWS, OLD + EXTRA, generator=generator),
        old=3 * torch.rand(ROWS, OLD, generator=generator),
        labels=torch.arange(ROWS) % CLASSES,
    )


def method(**given: float) -> Oca:
    torch.manual_seed(0)
    fresh = Oca(Setting(old_dimension=OLD, new_dimension=20, classes=CLASSES), extra=EXTRA, **given)
    nn.init.normal_(fresh.turn.bias)
    fresh.prepare(rows())
    return fresh


def cross_entropy(logits: Array, labels: Array, smoothing: float) -> float:
    shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    own = shares[np.arange(len(labels)), labels]
    return float(-((1 - smoothing) * own + smoothing * shares.mean(axis=1)).mean())


@pytest.mark.parametrize(
    ("scale", "smoothing"), [(1.0, 0.1), (30.0, 0.0)], ids=["the paper's logits", "scaled, not smoothed"]
)
def test_the_three_losses_are_the_papers(scale: float, smoothing: float) -> None:
    oca, batch = method(scale=scale, prototype_smoothing=smoothing), rows()
    old, labels = units(numbers(batch.old)), numbers(batch.labels).astype(int)
    z = units(numbers(batch.features))
    b = units(z[:, :OLD])
    prototypes = np.stack([old[labels == k].mean(axis=0) for k in range(CLASSES)])
    r = z @ numbers(oca.turn.weight).T + numbers(oca.turn.bias)
    expected = {
        "classes": 5 * cross_entropy(r @ numbers(oca.head.weight).T, labels, 0.1),
        "prototypes": 10 * cross_entropy(scale * b @ prototypes.T, labels, smoothing),
        "alignment": 5 * (1 - (b * units(prototypes)[labels]).sum(axis=1)).mean(),
    }
    assert {name: loss.item() for name, loss in oca.losses(batch).items()} == pytest.approx(expected, rel=1e-4)


def test_the_turn_could_be_part_of_the_head_but_for_its_bias() -> None:
    """(O, W) and (I, W O) give the same logits, up to W bias, which is the same for every vector."""
    oca, vectors = method(), F.normalize(torch.randn(9, OLD + EXTRA), dim=1)
    joined = vectors @ (oca.head.weight @ oca.turn.weight).T
    torch.testing.assert_close(oca.logits(vectors) - joined, (oca.head.weight @ oca.turn.bias).expand(9, -1))


def test_the_turn_has_no_part_in_what_is_stored() -> None:
    torch.manual_seed(0)
    oca = method()
    task = CompatibleTraining(nn.Flatten(), oca).eval()
    images = torch.rand(5, 1, 1, OLD + EXTRA)
    stored, logits = task(images), oca.logits(task(images))
    with torch.no_grad():
        for parameter in oca.turn.parameters():
            parameter.copy_(torch.randn_like(parameter))
    torch.testing.assert_close(task(images), stored, rtol=0, atol=0)
    assert not torch.allclose(oca.logits(stored), logits)
    torch.testing.assert_close(stored, F.normalize(images[:, 0, 0], dim=1))


def test_the_turn_stays_orthogonal_after_each_step() -> None:
    oca, batch = method(), rows()
    optimizer = torch.optim.Adam(oca.parameters(), lr=0.05, weight_decay=2**-15)
    before = numbers(oca.turn.weight)
    for _ in range(20):
        optimizer.zero_grad()
        torch.stack(list(oca.losses(batch).values())).sum().backward()
        optimizer.step()
        gram = numbers(oca.turn.weight).T @ numbers(oca.turn.weight)
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    assert np.abs(numbers(oca.turn.weight) - before).max() > 0.1
    assert parametrize.is_parametrized(oca.turn, "weight")
    assert not parametrize.is_parametrized(oca.turn, "bias")


def test_smoothed_labels_would_push_scaled_vectors_off_their_prototypes() -> None:
    """Why only the head's labels are smoothed: the gradient on the prototype must not point away from it."""
    classes, labels = 4, torch.arange(8) % 4
    setting = Setting(old_dimension=classes, new_dimension=classes, classes=classes)

    def cost(oca: Oca, away: float) -> float:
        others = (1 - F.one_hot(labels, classes)) * away
        batch = Batch(features=F.pad(F.one_hot(labels, classes) + others, (0, 32)), labels=labels)
        return oca.losses(batch)["prototypes"].item()

    ours, smoothed = Oca(setting), Oca(setting, prototype_smoothing=0.1)
    for oca in (ours, smoothed):
        oca.prepare(Batch(old=torch.eye(classes)[labels], labels=labels))
    assert cost(ours, 0.0) <= cost(ours, 0.3)
    assert cost(smoothed, 0.0) > cost(smoothed, 0.3)


def test_lengths_of_features_and_old_vectors_play_no_part() -> None:
    batch, other = rows(), method()
    assert batch.features is not None
    assert batch.old is not None
    longer = replace(batch, features=7 * batch.features, old=0.2 * batch.old)
    other.prepare(longer)
    torch.testing.assert_close(other.losses(longer), method().losses(batch))


def test_the_backward_map_takes_the_compatible_dimensions() -> None:
    backward = method().transformations().backward
    assert backward is not None
    vectors = torch.rand(4, OLD + EXTRA)
    torch.testing.assert_close(backward(vectors), F.normalize(vectors[:, :OLD], dim=1))


def test_its_width_follows_from_the_old_models() -> None:
    assert (method().feature_dimension, method().dimension) == (OLD + EXTRA, OLD + EXTRA)


def test_prototypes_go_with_the_weights() -> None:
    fresh = Oca(method().setting, extra=EXTRA)
    fresh.load_state_dict(method().state_dict())
    torch.testing.assert_close(fresh.losses(rows()), method().losses(rows()))


def test_what_it_cannot_do_is_named() -> None:
    with pytest.raises(ValueError, match="extra must be at least 0, not -1"):
        Oca(method().setting, extra=-1)
    with pytest.raises(ValueError, match="set `classes`"):
        Oca(replace(method().setting, classes=None))
    with pytest.raises(ValueError, match="needs `labels`"):
        method().prepare(replace(rows(), labels=None))
    with pytest.raises(ValueError, match="every row has the label 0"):
        method().prepare(replace(rows(), labels=torch.zeros(ROWS, dtype=torch.int64)))
