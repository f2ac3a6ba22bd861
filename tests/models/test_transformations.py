import pytest
import torch

from models.transformations import (
    Architecture,
    Fct,
    Identity,
    InvalidArchitecture,
    LayerSpec,
    Linear,
    Mlp,
    build,
    check_tensors,
    describe_architecture,
    expected_tensors,
    optional_tensors,
    parse_architecture,
    side_dimension,
)

ARCHITECTURES: dict[str, Architecture] = {
    "identity": Identity(source_dimension=6, target_dimension=4),
    "linear": Linear(source_dimension=6, target_dimension=4, normalize_output=True),
    "mlp": Mlp(
        source_dimension=6,
        target_dimension=4,
        layers=(
            LayerSpec(width=8, norm="batch", activation="relu"),
            LayerSpec(width=5, norm="layer", activation="gelu"),
            LayerSpec(width=4, activation="silu"),
        ),
    ),
    "residual mlp": Mlp(source_dimension=6, target_dimension=4, layers=(LayerSpec(width=4),), residual=True),
    "square residual mlp": Mlp(
        source_dimension=4, target_dimension=4, layers=(LayerSpec(width=4),), residual=True, normalize_input=True
    ),
    "fct": Fct(source_dimension=6, target_dimension=4, side_dimension=3, hidden=16),
    "fct without side": Fct(source_dimension=6, target_dimension=4, side_dimension=None, hidden=16),
}


def parameters(architecture: Architecture, optional: tuple[str, ...] = ()) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(architecture, optional=optional).parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
class TestEveryArchitecture:
    def test_its_description_reads_back_as_itself(self, architecture: Architecture) -> None:
        assert parse_architecture(describe_architecture(architecture)) == architecture

    def test_its_module_holds_exactly_the_required_tensors(self, architecture: Architecture) -> None:
        shapes = {name: tuple(t.shape) for name, t in build(architecture).state_dict().items()}
        optional = optional_tensors(architecture)
        assert shapes == {n: s for n, s in expected_tensors(architecture).items() if n not in optional}

    def test_its_module_holds_all_optional_tensors_on_request(self, architecture: Architecture) -> None:
        module = build(architecture, optional=optional_tensors(architecture))
        assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == expected_tensors(architecture)

    def test_it_maps_rows_to_the_target_dimension(self, architecture: Architecture) -> None:
        module = build(architecture).eval()
        width = side_dimension(architecture)
        side = None if width is None else torch.randn(7, width)
        assert module(torch.randn(7, architecture.source_dimension), side).shape == (7, architecture.target_dimension)


@pytest.mark.parametrize(
    ("source", "target", "plain", "with_uncertainty"),
    [(128, 128, 5_712_000, 5_712_129), (384, 768, 15_025_920, 15_026_689), (512, 768, 16_272_128, 16_272_897)],
)
def test_fct_has_the_published_number_of_parameters(
    source: int, target: int, plain: int, with_uncertainty: int
) -> None:
    fct = Fct(source_dimension=source, target_dimension=target, side_dimension=source, hidden=2048)
    assert parameters(fct) == plain
    assert parameters(fct, ("uncertainty.weight", "uncertainty.bias")) == with_uncertainty


def test_identity_truncates_and_pads_with_zeros() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert build(Identity(source_dimension=3, target_dimension=2))(x).tolist() == [[1.0, 2.0]]
    assert build(Identity(source_dimension=3, target_dimension=5))(x).tolist() == [[1.0, 2.0, 3.0, 0.0, 0.0]]


def test_linear_is_centred_multiplied_and_moved() -> None:
    module = build(Linear(source_dimension=3, target_dimension=2), optional=("bias", "source_mean", "target_mean"))
    tensors = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
    module.load_state_dict(tensors)
    x = torch.randn(5, 3)
    expected = (x - tensors["source_mean"]) @ tensors["weight"].T + tensors["bias"] + tensors["target_mean"]
    torch.testing.assert_close(module(x), expected)


def test_a_layer_is_linear_then_norm_then_activation() -> None:
    layers = (LayerSpec(width=4, norm="batch", activation="relu"), LayerSpec(width=2, norm="layer", activation="silu"))
    module = build(Mlp(source_dimension=3, target_dimension=2, layers=layers), optional=("layers.0.bias",)).eval()
    tensors = {name: torch.rand_like(value) for name, value in module.state_dict().items()}
    module.load_state_dict(tensors)
    x = torch.randn(5, 3)

    first = x @ tensors["layers.0.weight"].T + tensors["layers.0.bias"]
    first = (first - tensors["layers.0.norm.running_mean"]) / (tensors["layers.0.norm.running_var"] + 1e-5).sqrt()
    first = (first * tensors["layers.0.norm.weight"] + tensors["layers.0.norm.bias"]).clamp(min=0)
    second = first @ tensors["layers.1.weight"].T
    centred = second - second.mean(1, keepdim=True)
    second = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    second = second * tensors["layers.1.norm.weight"] + tensors["layers.1.norm.bias"]
    torch.testing.assert_close(module(x), second * second.sigmoid())


def test_a_residual_without_skip_adds_the_input() -> None:
    architecture = Mlp(source_dimension=3, target_dimension=3, layers=(LayerSpec(width=3),), residual=True)
    module = build(architecture)
    x = torch.randn(5, 3)
    torch.testing.assert_close(module(x), x + x @ module.state_dict()["layers.0.weight"].T)


def test_a_residual_with_skip_adds_the_input_through_it() -> None:
    architecture = Mlp(source_dimension=3, target_dimension=2, layers=(LayerSpec(width=2),), residual=True)
    module = build(architecture, optional=("skip.bias",))
    state = module.state_dict()
    x = torch.randn(5, 3)
    expected = x @ state["layers.0.weight"].T + x @ state["skip.weight"].T + state["skip.bias"]
    torch.testing.assert_close(module(x), expected)


def test_normalisation_makes_unit_rows_and_leaves_zero_rows_alone() -> None:
    identity = Identity(source_dimension=2, target_dimension=2, normalize_output=True)
    output = build(identity)(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(output, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_a_normalised_input_makes_the_scale_of_a_row_irrelevant() -> None:
    module = build(Linear(source_dimension=3, target_dimension=2, normalize_input=True))
    x = torch.randn(4, 3)
    torch.testing.assert_close(module(x), module(x * 7))


def test_a_row_of_tiny_numbers_has_a_direction_like_any_other() -> None:
    """The cosine of a stored vector does not depend on its length, so its image must not either."""
    module = build(Linear(source_dimension=3, target_dimension=2, normalize_input=True, normalize_output=True))
    x = torch.randn(4, 3)
    torch.testing.assert_close(module(x), module(x * 1e-15))


def test_fct_without_side_information_feeds_the_embedding_to_both_branches() -> None:
    with_side = build(Fct(source_dimension=4, target_dimension=3, side_dimension=4, hidden=8)).eval()
    without = build(Fct(source_dimension=4, target_dimension=3, side_dimension=None, hidden=8)).eval()
    without.load_state_dict(with_side.state_dict())
    x = torch.randn(5, 4)
    torch.testing.assert_close(without(x), with_side(x, x))


def test_fct_with_side_information_refuses_to_go_without() -> None:
    module = build(ARCHITECTURES["fct"])
    with pytest.raises(ValueError, match="needs side-information"):
        module(torch.randn(2, 6))


FCT = {"kind": "fct", "source_dimension": 6, "target_dimension": 4, "side_dimension": 3, "hidden": 16}
MLP = {"kind": "mlp", "source_dimension": 6, "target_dimension": 4, "layers": [{"width": 4}], "residual": False}


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ([], "must be an object"),
        ({}, "kind None"),
        ({**FCT, "kind": "resnet"}, "'resnet' is not one of"),
        ({**FCT, "kind": ["fct"]}, "is not one of"),
        ({**FCT, "dropout": 0.1}, "unknown field 'dropout'"),
        ({k: v for k, v in FCT.items() if k != "hidden"}, "'hidden' is missing"),
        ({**FCT, "source_dimension": 0}, "source_dimension must be an integer from 1 to 8192"),
        ({**FCT, "source_dimension": 8193}, "source_dimension must be an integer"),
        ({**FCT, "target_dimension": 4.0}, "target_dimension must be an integer"),
        ({**FCT, "target_dimension": True}, "target_dimension must be an integer"),
        ({**FCT, "hidden": 65537}, "hidden must be an integer from 1 to 65536"),
        ({**FCT, "side_dimension": "3"}, "side_dimension must be an integer"),
        ({**FCT, "normalize_output": 1}, "normalize_output must be true or false"),
        ({**MLP, "layers": []}, "1 to 32 layers"),
        ({**MLP, "layers": [{"width": 4}] * 33}, "1 to 32 layers"),
        ({**MLP, "layers": {"width": 4}}, "layers is a list"),
        ({**MLP, "layers": ["wide"]}, "a layer must be an object"),
        ({**MLP, "layers": [{"width": 5}]}, "the last layer is 5 wide, the target dimension is 4"),
        ({**MLP, "layers": [{"width": 4, "norm": "group"}]}, "norm must be one of"),
        ({**MLP, "layers": [{"width": 4, "activation": ["relu"]}]}, "activation must be one of"),
        ({**MLP, "layers": [{"width": 4, "bias": True}]}, "unknown field 'bias'"),
        ({**MLP, "residual": "yes"}, "residual must be true or false"),
    ],
)
def test_what_is_not_exactly_of_the_list_is_refused(declared: object, message: str) -> None:
    with pytest.raises(InvalidArchitecture, match=message):
        parse_architecture(declared)


def test_tensors_must_be_those_implied() -> None:
    fct = ARCHITECTURES["fct"]
    good = {name: shape for name, shape in expected_tensors(fct).items() if name not in optional_tensors(fct)}
    check_tensors(fct, good)
    with pytest.raises(InvalidArchitecture, match=r"no tensor 'extra'"):
        check_tensors(fct, {**good, "extra": (1,)})
    with pytest.raises(InvalidArchitecture, match=r"needs the tensor 'mixer.2.bias'"):
        check_tensors(fct, {name: shape for name, shape in good.items() if name != "mixer.2.bias"})
    with pytest.raises(InvalidArchitecture, match=r"'old.0.weight' has shape \(6, 12\), it must be \(12, 6\)"):
        check_tensors(fct, {**good, "old.0.weight": (6, 12)})
    with pytest.raises(InvalidArchitecture, match=r"'uncertainty.weight' needs the tensor 'uncertainty.bias'"):
        check_tensors(fct, {**good, "uncertainty.weight": (1, 4)})


def test_building_with_an_unknown_optional_tensor_is_refused() -> None:
    with pytest.raises(InvalidArchitecture, match="no optional tensor 'bias'"):
        build(ARCHITECTURES["fct"], optional=("bias",))
