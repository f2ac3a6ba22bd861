"""Packed weights give what the others give."""

import copy

import numpy as np
import pytest
import torch

from models import packing
from models.packing import packed
from models.transformations import Architecture, Fct, LayerSpec, Linear, Mlp, Transformation, build

EVERY_LAYER = (
    LayerSpec(width=40, norm="layer", activation="gelu"),
    LayerSpec(width=33, activation="relu"),
    LayerSpec(width=17, norm="layer", activation="relu"),
    LayerSpec(width=20, activation="silu"),
    LayerSpec(width=24),
)
BIASES = tuple(f"layers.{at}.bias" for at in range(len(EVERY_LAYER)))
NETWORKS: dict[str, tuple[Architecture, tuple[str, ...]]] = {
    "mlp": (Mlp(source_dimension=16, target_dimension=24, layers=EVERY_LAYER), BIASES),
    "mlp without a bias": (Mlp(source_dimension=16, target_dimension=24, layers=EVERY_LAYER), ()),
    "residual": (Mlp(source_dimension=16, target_dimension=24, layers=EVERY_LAYER, residual=True), ("skip.bias",)),
    "linear, which has no layers": (Linear(source_dimension=16, target_dimension=24), ("bias",)),
}

pytestmark = pytest.mark.skipif(not packing._can_pack(), reason="this PyTorch or processor has no packed bfloat16")


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Transformation:
    torch.manual_seed(0)
    architecture, optional = NETWORKS[request.param]
    return build(architecture, optional=optional).eval().to(torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 16, 100, 2048])
def test_it_gives_what_it_gave_before(network: Transformation, rows: int) -> None:
    given = torch.randn(rows, 16).to(torch.bfloat16)
    with torch.inference_mode():
        expected = network(given).float()
        made = packed(copy.deepcopy(network), 2048)(given).float()
    np.testing.assert_allclose(made.numpy(), expected.numpy(), atol=0.01, rtol=0.02)


def test_every_layer_is_packed_but_for_a_batch_norm_which_is_folded_first() -> None:
    network = build(Fct(source_dimension=6, target_dimension=4, side_dimension=3, hidden=16)).eval().to(torch.bfloat16)
    linear = sum(isinstance(each, torch.nn.Linear) for each in network.modules())
    packed(network, 64)
    assert linear == sum(isinstance(each, packing._Packed) for each in network.modules()) == 7
    assert not any(isinstance(each, torch.nn.Linear) for each in network.modules())


def test_where_it_cannot_be_done_the_network_stays_as_it_is(
    network: Transformation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_can_pack", lambda: False)
    before = [*network.modules()]
    assert [*packed(network, 64).modules()] == before


def test_operators_that_are_there_and_do_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def others(*_: object) -> torch.Tensor:
        raise TypeError("takes 7 arguments")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", others)
    assert not packing._can_pack.__wrapped__()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda values, *_: torch.zeros_like(values))
    assert not packing._can_pack.__wrapped__()


def test_whether_it_can_be_done_is_found_out_without_anybodys_random_numbers() -> None:
    before = torch.random.get_rng_state()
    packing._can_pack.__wrapped__()
    assert torch.equal(torch.random.get_rng_state(), before)
