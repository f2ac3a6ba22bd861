import pytest
import torch

from models.folding import folded
from models.transformations import Architecture, Fct, LayerSpec, Mlp, build

BATCH = LayerSpec(width=9, norm="batch", activation="relu")
ARCHITECTURES: dict[str, tuple[Architecture, tuple[str, ...]]] = {
    "fct": (Fct(source_dimension=6, target_dimension=4, side_dimension=3, hidden=16), ()),
    "with an uncertainty head": (
        Fct(source_dimension=6, target_dimension=4, side_dimension=3, hidden=16),
        ("uncertainty.weight", "uncertainty.bias"),
    ),
    "mlp with biases and other norms": (
        Mlp(
            source_dimension=6,
            target_dimension=4,
            layers=(BATCH, LayerSpec(width=5, norm="layer", activation="gelu"), LayerSpec(width=4, norm="batch")),
            residual=True,
        ),
        ("layers.0.bias", "layers.1.bias"),
    ),
}


@pytest.mark.parametrize(("architecture", "optional"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_folded_module_is_the_same_map_without_batch_norms(
    architecture: Architecture, optional: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    module = build(architecture, optional=optional)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if ".norm." in name:  # what training would have left there
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    embeddings, side = torch.randn(50, 6), torch.randn(50, 3)
    module.eval()
    expected, before = module.raw(embeddings, side), {name: t.clone() for name, t in module.state_dict().items()}
    made = folded(module)
    torch.testing.assert_close(made.raw(embeddings, side), expected, rtol=1e-5, atol=1e-5)
    assert not [name for name in made.state_dict() if "running_" in name]
    assert not any(parameter.requires_grad for parameter in made.parameters())
    if module.has_uncertainty:
        torch.testing.assert_close(made.log_variance(expected), module.log_variance(expected))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), "the module itself is left as it is"
