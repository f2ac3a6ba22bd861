from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from models.low_rank_adapters import AdaptedLinear, add_adapters, merge_adapters


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2, bias=False))


def changed(rank: int = 3) -> nn.Sequential:
    """Adapted, as if trained: B is not zero any more."""
    adapted = add_adapters(network(), rank=rank)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith(".b"):
                parameter.normal_()
    return adapted


def rows() -> torch.Tensor:
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


def test_the_output_is_the_papers_sum() -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(6, 4), rank=2)
    nn.init.normal_(layer.b)
    state = {name: tensor.double().numpy() for name, tensor in layer.state_dict().items()}
    changed = state["linear.weight"] + state["b"] @ state["a"]
    expected = rows().double().numpy() @ changed.T + state["linear.bias"]
    np.testing.assert_allclose(layer(rows()).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_it_starts_as_exactly_the_module_that_was_given() -> None:
    torch.testing.assert_close(add_adapters(network())(rows()), network()(rows()), rtol=0, atol=0)


def test_merging_keeps_the_outputs_and_leaves_plain_linear_layers() -> None:
    adapted = changed()
    before = adapted(rows()).detach()
    assert not torch.allclose(before, network()(rows()))
    merged = merge_adapters(adapted)
    torch.testing.assert_close(merged(rows()), before)
    assert merged.state_dict().keys() == network().state_dict().keys()
    assert all(type(module) is type(plain) for module, plain in zip(merged, network(), strict=True))


def test_the_change_has_at_most_the_rank_that_was_asked_for() -> None:
    before, merged = network(), merge_adapters(changed(rank=3))
    for place, rank in ((1, 3), (3, 2)):  # the last layer is 2 wide
        difference = merged[place].weight.detach() - before[place].weight.detach()
        assert torch.linalg.matrix_rank(difference, rtol=1e-4) == rank


def test_only_the_adapters_are_trained() -> None:
    adapted = changed()
    frozen = {name: p.detach().clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert sorted({name.rsplit(".", 1)[1] for name in trained}) == ["a", "b"]
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(rows()).square().sum().backward()
    optimizer.step()
    for name, parameter in adapted.named_parameters():
        if name in frozen:
            assert parameter.grad is None
            torch.testing.assert_close(parameter.detach(), frozen[name], rtol=0, atol=0)
        else:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0


def test_a_first_step_moves_b_alone() -> None:
    """B is zero, so A has no gradient yet: what makes the start exact does not stop the training."""
    adapted = add_adapters(network())
    adapted(rows()).square().sum().backward()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert (parameter.grad.abs().sum() > 0) == name.endswith(".b")


def test_merging_a_copy_leaves_the_original_to_be_trained_on() -> None:
    adapted = changed()
    copied = merge_adapters(deepcopy(adapted))
    torch.testing.assert_close(copied(rows()), adapted(rows()))
    assert any(parameter.requires_grad for parameter in adapted.parameters())


def test_a_state_survives_a_round_trip() -> None:
    again = add_adapters(network(seed=5), rank=3)
    again.load_state_dict(changed().state_dict())
    torch.testing.assert_close(again(rows()), changed()(rows()), rtol=0, atol=0)


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(ValueError, match="no linear layer"):
        add_adapters(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="no change of rank 0"):
        add_adapters(network(), rank=0)
