"""What is trained between frames is exported as a map of vectors as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.evaluation import Metric
from models.frames import Frame, between
from models.moments import unit
from models.transformations import Architecture, Fct, Identity, LayerSpec, Linear, Mlp, build, side_dimension

GELU = (LayerSpec(width=7, activation="gelu"), LayerSpec(width=5))
SKIP = ("layers.0.bias", "layers.1.bias", "skip.bias")
UNCERTAIN = ("uncertainty.weight", "uncertainty.bias")
MAPS: dict[str, tuple[Architecture, tuple[str, ...]]] = {
    "linear": (Linear(source_dimension=6, target_dimension=5), ()),
    "linear with a bias": (Linear(source_dimension=6, target_dimension=5), ("bias",)),
    "layers": (Mlp(source_dimension=6, target_dimension=5, layers=GELU), ()),
    "layers with a skip": (Mlp(source_dimension=6, target_dimension=5, layers=GELU, residual=True), SKIP),
    "layers around the identity": (Mlp(source_dimension=5, target_dimension=5, layers=GELU, residual=True), SKIP[:2]),
    "fct": (Fct(source_dimension=6, target_dimension=5, side_dimension=3, hidden=8), ()),
    "fct, uncertain": (Fct(source_dimension=6, target_dimension=5, side_dimension=3, hidden=8), UNCERTAIN),
    "fct without side-information": (Fct(source_dimension=6, target_dimension=5, side_dimension=None, hidden=8), ()),
}


def vectors(width: int, unit: float, seed: int) -> Tensor:
    drawn = torch.randn(40, width, generator=torch.Generator().manual_seed(seed))
    return unit * (drawn + torch.arange(width))


def measured(rows: Tensor, metric: Metric = "euclidean") -> Frame:
    frame = Frame(rows.shape[1], metric=metric)
    frame.measure(rows)
    return frame


def test_a_frame_has_mean_0_and_scale_1_and_goes_back() -> None:
    rows = vectors(6, 1e-3, seed=0)
    frame = measured(rows)
    inside = frame(rows)
    torch.testing.assert_close(inside.mean(dim=0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(inside.square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(frame.back(inside), rows)


def test_rows_that_are_all_the_same_have_a_mean_and_no_scale() -> None:
    frame = measured(torch.full((9, 3), 7.0))
    assert frame.mean.tolist() == [7, 7, 7]
    assert frame.scale.item() == 1


def test_under_cosine_it_is_measured_on_unit_rows_and_what_comes_back_has_their_direction() -> None:
    rows = vectors(6, 1.0, seed=0) + 30
    frame = measured(rows, "cosine")
    inside = frame(rows)
    torch.testing.assert_close(inside.mean(dim=0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(inside.square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(frame(7 * rows), inside)
    torch.testing.assert_close(frame.back(inside), unit(rows))
    torch.testing.assert_close(frame.landed(3 * inside), frame(frame.back(3 * inside)))


@pytest.mark.parametrize("away", [0.5, 20.0])
def test_of_a_mean_it_keeps_as_much_as_it_is_told_to(away: float) -> None:
    rows = vectors(6, 1.0, seed=0)
    rows = rows - rows.mean(dim=0) + away
    frame = Frame(6)
    frame.measure(rows, kept=1.0, deviation=5.0)
    inside = frame(rows)
    apart = (inside - inside.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    assert apart.item() == pytest.approx(5 * 6**0.5, rel=1e-4)
    least = away * 6**0.5 / (rows - away).square().sum(dim=1).mean().sqrt().item()
    assert (inside.mean(dim=0).norm() / apart).item() == pytest.approx(min(1, least), rel=1e-4)


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_it_gives_vectors_a_root_mean_square_length_of_1_where_no_deviation_is_asked_for(kept: float) -> None:
    rows, frame = vectors(6, 30.0, seed=0), Frame(6)
    frame.measure(rows, kept=kept, deviation=None)
    assert frame(rows).square().sum(dim=1).mean().item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("name", MAPS)
def test_the_exported_map_is_the_one_that_was_trained(name: str, metric: Metric) -> None:
    architecture, optional = MAPS[name]
    torch.manual_seed(0)
    trained = build(architecture, optional=optional)
    old, new = vectors(architecture.source_dimension, 1e-2, seed=1), vectors(5, 30.0, seed=2)
    side = vectors(3, 4.0, seed=3)
    source, target, beside = measured(old, metric), measured(new, metric), measured(side)
    trained(source(old), beside(side))  # moves the running statistics of a batch norm
    trained.eval()
    exported = between(trained, source, target, beside if side_dimension(architecture) else None)

    with torch.no_grad():
        inside, output = trained.raw(source(old), beside(side)), exported.raw(old, side)
        torch.testing.assert_close(output, target.back(inside), rtol=1e-4, atol=1e-3)
        if optional is UNCERTAIN:
            torch.testing.assert_close(
                exported.log_variance(output), trained.log_variance(inside), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("name", MAPS)
def test_frames_that_were_not_measured_change_nothing(name: str) -> None:
    architecture, optional = MAPS[name]
    trained = build(architecture, optional=optional)
    exported = between(
        trained, Frame(architecture.source_dimension), Frame(5), Frame(3) if side_dimension(architecture) else None
    )
    assert exported.state_dict().keys() == trained.state_dict().keys()
    for key, tensor in trained.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[key], tensor, rtol=0, atol=0)


def test_what_is_never_trained_is_refused() -> None:
    with pytest.raises(TypeError, match="no map of kind 'identity' is trained"):
        between(build(Identity(source_dimension=2, target_dimension=2)), Frame(2), Frame(2))
