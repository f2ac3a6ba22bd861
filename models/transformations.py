"""The closed list of architectures an artifact may declare, the tensors each implies, and the modules that compute it.

An architecture is data: kind, dimensions, widths. `expected_tensors` says which tensors a file of that architecture
holds, without building anything, so that a file can be judged before a byte of it is used. Anyone can write such a file
without this code, so a name or a shape never changes once it is published.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.moments import unit

MAX_DIMENSION = 8_192
MAX_WIDTH = 65_536
MAX_LAYERS = 32
BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1
NORMS = ("batch", "layer", None)
ACTIVATIONS = ("relu", "gelu", "silu", None)

Shapes = dict[str, tuple[int, ...]]


class InvalidArchitecture(ValueError):
    """The architecture is not one of the closed list, or its tensors are not those it implies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What every kind declares."""

    kind: ClassVar[str]

    source_dimension: int
    target_dimension: int
    #: L2 per row, before and after the map. A zero row stays zero.
    normalize_input: bool = False
    normalize_output: bool = False

    def __post_init__(self) -> None:
        _check_integer("source_dimension", self.source_dimension, MAX_DIMENSION)
        _check_integer("target_dimension", self.target_dimension, MAX_DIMENSION)
        _check_bool("normalize_input", self.normalize_input)
        _check_bool("normalize_output", self.normalize_output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity(Architecture):
    """Truncates, or pads with zeros, to the target dimension."""

    kind: ClassVar[str] = "identity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Architecture):
    """y = (x - source_mean) weight^T + bias + target_mean."""

    kind: ClassVar[str] = "linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer of an MLP: linear, then norm, then activation."""

    width: int
    norm: str | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        _check_integer("width", self.width, MAX_WIDTH)
        _check_choice("norm", self.norm, NORMS)
        _check_choice("activation", self.activation, ACTIVATIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp(Architecture):
    """Layers one after the other; `residual` adds the input, through `skip` where it has one."""

    kind: ClassVar[str] = "mlp"

    layers: tuple[LayerSpec, ...]
    residual: bool = False

    def __post_init__(self) -> None:
        Architecture.__post_init__(self)
        _check_bool("residual", self.residual)
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise InvalidArchitecture(f"an mlp has 1 to {MAX_LAYERS} layers, not {len(self.layers)}")
        if self.layers[-1].width != self.target_dimension:
            raise InvalidArchitecture(
                f"the last layer is {self.layers[-1].width} wide, the target dimension is {self.target_dimension}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fct(Architecture):
    """Forward Compatible Training (CVPR 2022): a branch for the embedding, one for the side-information, a mixer.

    `side_dimension` None is the paper's variant without side-information: the embedding is fed to both branches.
    """

    kind: ClassVar[str] = "fct"

    side_dimension: int | None
    hidden: int

    def __post_init__(self) -> None:
        Architecture.__post_init__(self)
        _check_integer("hidden", self.hidden, MAX_WIDTH)
        if self.side_dimension is not None:
            _check_integer("side_dimension", self.side_dimension, MAX_DIMENSION)


_Declared = TypeVar("_Declared", Architecture, LayerSpec)

KINDS: dict[str, type[Architecture]] = {kind.kind: kind for kind in (Identity, Linear, Mlp, Fct)}


def parse_architecture(declared: object) -> Architecture:
    """Read an architecture from plain data, as JSON gives it, refusing whatever is not exactly one of the list.

    Args:
        declared: an object with `kind` and the fields of that kind.

    Raises:
        InvalidArchitecture: an unknown kind, a missing or unknown field, a wrong type, or a size out of bounds.
    """
    values = dict(_object("the architecture", declared))
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise InvalidArchitecture(f"the kind {kind!r} is not one of {', '.join(KINDS)}")
    if kind == Mlp.kind and "layers" in values:
        layers = values["layers"]
        if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
            raise InvalidArchitecture(f"layers is a list of 1 to {MAX_LAYERS} layers")
        values["layers"] = tuple(_construct(LayerSpec, _object("a layer", layer)) for layer in layers)
    return _construct(KINDS[kind], values)


def describe_architecture(architecture: Architecture) -> dict[str, object]:
    """Return an architecture as the plain data that `parse_architecture` reads."""
    described: dict[str, object] = {"kind": architecture.kind, **asdict(architecture)}
    if isinstance(architecture, Mlp):
        described["layers"] = [asdict(layer) for layer in architecture.layers]
    return described


def side_dimension(architecture: Architecture) -> int | None:
    """Return the width of the side-information that the architecture needs, None if it needs none."""
    return architecture.side_dimension if isinstance(architecture, Fct) else None


def expected_tensors(architecture: Architecture) -> Shapes:
    """Return the name and shape of every tensor the architecture may have, the optional ones included."""
    match architecture:
        case Linear(source_dimension=source, target_dimension=target):
            return {"weight": (target, source), "bias": (target,), "source_mean": (source,), "target_mean": (target,)}
        case Mlp():
            return _mlp_tensors(architecture)
        case Fct():
            return _fct_tensors(architecture)
        case _:
            return {}


def optional_tensors(architecture: Architecture) -> dict[str, frozenset[str]]:
    """Return the tensors that may be absent, each with those it cannot be present without."""
    match architecture:
        case Linear():
            return dict.fromkeys(("bias", "source_mean", "target_mean"), frozenset())
        case Mlp():
            optional = {f"layers.{i}.bias": frozenset[str]() for i in range(len(architecture.layers))}
            if architecture.residual:
                optional["skip.bias"] = frozenset({"skip.weight"})
                if architecture.source_dimension == architecture.target_dimension:
                    optional["skip.weight"] = frozenset()
            return optional
        case Fct():
            return {
                "uncertainty.weight": frozenset({"uncertainty.bias"}),
                "uncertainty.bias": frozenset({"uncertainty.weight"}),
            }
        case _:
            return {}


def check_tensors(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that tensors are exactly those an architecture implies.

    Raises:
        InvalidArchitecture: a tensor is missing, unknown, of another shape, or without its companion.
    """
    expected, optional = expected_tensors(architecture), optional_tensors(architecture)
    unknown = sorted(shapes.keys() - expected.keys())
    missing = sorted(expected.keys() - optional.keys() - shapes.keys())
    if unknown:
        raise InvalidArchitecture(f"{architecture.kind} has no tensor {unknown[0]!r}")
    if missing:
        raise InvalidArchitecture(f"{architecture.kind} needs the tensor {missing[0]!r}")
    for name, shape in shapes.items():
        if tuple(shape) != expected[name]:
            raise InvalidArchitecture(f"the tensor {name!r} has shape {tuple(shape)}, it must be {expected[name]}")
        alone = sorted(optional.get(name, frozenset()) - shapes.keys())
        if alone:
            raise InvalidArchitecture(f"the tensor {name!r} needs the tensor {alone[0]!r} beside it")


class Transformation(nn.Module):
    """A map between two models' spaces. Its `state_dict` is exactly what its artifact holds."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture

    def forward(self, embeddings: Tensor, side: Tensor | None = None) -> Tensor:
        """Map embeddings (n, d_source), with side-information (n, d_side) where it is needed, to (n, d_target)."""
        return self.finish(self.raw(embeddings, side))

    def raw(self, embeddings: Tensor, side: Tensor | None = None) -> Tensor:
        """Map as `forward` does, before the output is normalised: what the uncertainty head sees."""
        if self.architecture.normalize_input:
            embeddings = unit(embeddings)
        return self.transform(embeddings, side)

    def finish(self, output: Tensor) -> Tensor:
        """Normalise the output if the architecture says so."""
        return unit(output) if self.architecture.normalize_output else output

    def transform(self, embeddings: Tensor, side: Tensor | None) -> Tensor:
        """Compute the map itself, between the two normalisations."""
        raise NotImplementedError

    @property
    def has_uncertainty(self) -> bool:
        """Say whether `log_variance` predicts anything."""
        return False

    def log_variance(self, output: Tensor) -> Tensor:
        """Predict each row's log-variance (n,) from the output of `raw`; only where there is an uncertainty head."""
        raise NotImplementedError(f"a {self.architecture.kind} transformation has no uncertainty head")


class IdentityTransformation(Transformation):
    """See `Identity`."""

    def transform(self, embeddings: Tensor, side: Tensor | None) -> Tensor:
        del side
        missing = self.architecture.target_dimension - self.architecture.source_dimension
        return F.pad(embeddings, (0, missing))  # a negative padding truncates


class LinearTransformation(Transformation):
    """See `Linear`."""

    source_mean: Tensor | None
    target_mean: Tensor | None

    def __init__(self, architecture: Linear, optional: Collection[str] = ()) -> None:
        super().__init__(architecture)
        source, target = architecture.source_dimension, architecture.target_dimension
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(target, source)))
        self.bias = nn.Parameter(torch.zeros(target)) if "bias" in optional else None
        self.register_buffer("source_mean", torch.zeros(source) if "source_mean" in optional else None)
        self.register_buffer("target_mean", torch.zeros(target) if "target_mean" in optional else None)

    def transform(self, embeddings: Tensor, side: Tensor | None) -> Tensor:
        del side
        if self.source_mean is not None:
            embeddings = embeddings - self.source_mean
        output = F.linear(embeddings, self.weight, self.bias)
        return output if self.target_mean is None else output + self.target_mean


class MlpTransformation(Transformation):
    """See `Mlp`."""

    def __init__(self, architecture: Mlp, optional: Collection[str] = ()) -> None:
        super().__init__(architecture)
        source, target = architecture.source_dimension, architecture.target_dimension
        widths = [source, *(layer.width for layer in architecture.layers)]
        self.layers = nn.Sequential(
            *(
                Layer(widths[i], layer.width, layer.norm, layer.activation, bias=f"layers.{i}.bias" in optional)
                for i, layer in enumerate(architecture.layers)
            )
        )
        self.residual = architecture.residual
        has_skip = architecture.residual and (source != target or "skip.weight" in optional)
        self.skip = nn.Linear(source, target, bias="skip.bias" in optional) if has_skip else None

    def transform(self, embeddings: Tensor, side: Tensor | None) -> Tensor:
        del side
        output: Tensor = self.layers(embeddings)
        if not self.residual:
            return output
        return output + (embeddings if self.skip is None else self.skip(embeddings))


class FctTransformation(Transformation):
    """See `Fct`. Widths are those of the authors' code: 2d, then 2 d_target per branch; the mixer is `hidden` wide."""

    def __init__(self, architecture: Fct, optional: Collection[str] = ()) -> None:
        super().__init__(architecture)
        source, target, hidden = architecture.source_dimension, architecture.target_dimension, architecture.hidden
        side = architecture.side_dimension or source
        self.old = nn.Sequential(_block(source, 2 * source), _block(2 * source, 2 * target))
        self.side = nn.Sequential(_block(side, 2 * side), _block(2 * side, 2 * target))
        self.mixer = nn.Sequential(_block(4 * target, hidden), _block(hidden, hidden), Layer(hidden, target, bias=True))
        self.needs_side = architecture.side_dimension is not None
        self.uncertainty = nn.Linear(target, 1) if "uncertainty.weight" in optional else None

    def transform(self, embeddings: Tensor, side: Tensor | None) -> Tensor:
        if self.needs_side and side is None:
            raise ValueError("this transformation needs side-information beside the embeddings")
        branches = (self.old(embeddings), self.side(side if self.needs_side else embeddings))
        output: Tensor = self.mixer(torch.cat(branches, dim=1))
        return output

    @property
    def has_uncertainty(self) -> bool:
        return self.uncertainty is not None

    def log_variance(self, output: Tensor) -> Tensor:
        if self.uncertainty is None:
            return super().log_variance(output)
        predicted: Tensor = self.uncertainty(output)[:, 0]
        return predicted


class BatchNorm(nn.Module):
    """Batch normalisation with the four tensors that an artifact holds, and no counter beside them."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, values: Tensor) -> Tensor:
        """Normalise values (n, width): by the batch's statistics while training, by the running ones otherwise."""
        return F.batch_norm(
            values,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=BATCH_NORM_MOMENTUM,
            eps=BATCH_NORM_EPS,
        )


class Layer(nn.Linear):
    """Linear, then norm, then activation."""

    def __init__(
        self, inputs: int, width: int, norm: str | None = None, activation: str | None = None, *, bias: bool
    ) -> None:
        super().__init__(inputs, width, bias=bias)
        norms = {"batch": BatchNorm, "layer": nn.LayerNorm}
        activations = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
        self.norm: nn.Module = nn.Identity() if norm is None else norms[norm](width)
        self.activation: nn.Module = nn.Identity() if activation is None else activations[activation]()

    def forward(self, values: Tensor) -> Tensor:
        """Map values (n, inputs) to (n, width)."""
        output: Tensor = self.activation(self.norm(super().forward(values)))
        return output


def build(architecture: Architecture, *, optional: Collection[str] = ()) -> Transformation:
    """Make the module of an architecture, with fresh weights.

    Args:
        architecture: what to compute.
        optional: which of `optional_tensors(architecture)` it has, for instance `uncertainty.weight` and `.bias`.

    Raises:
        InvalidArchitecture: a name in `optional` is not optional there, or lacks its companion.
    """
    allowed = optional_tensors(architecture)
    for name in optional:
        if name not in allowed:
            raise InvalidArchitecture(f"{architecture.kind} has no optional tensor {name!r}")
    required = expected_tensors(architecture).keys() - allowed.keys()
    check_tensors(
        architecture, {n: s for n, s in expected_tensors(architecture).items() if n in {*required, *optional}}
    )
    match architecture:
        case Linear():
            return LinearTransformation(architecture, optional)
        case Mlp():
            return MlpTransformation(architecture, optional)
        case Fct():
            return FctTransformation(architecture, optional)
        case _:
            return IdentityTransformation(architecture)


def _block(inputs: int, width: int) -> Layer:
    return Layer(inputs, width, "batch", "relu", bias=False)


def _mlp_tensors(architecture: Mlp) -> Shapes:
    shapes: Shapes = {}
    inputs = architecture.source_dimension
    for i, layer in enumerate(architecture.layers):
        shapes[f"layers.{i}.weight"] = (layer.width, inputs)
        shapes[f"layers.{i}.bias"] = (layer.width,)
        shapes |= _norm_tensors(f"layers.{i}", layer.width, layer.norm)
        inputs = layer.width
    if architecture.residual:
        shapes["skip.weight"] = (architecture.target_dimension, architecture.source_dimension)
        shapes["skip.bias"] = (architecture.target_dimension,)
    return shapes


def _fct_tensors(architecture: Fct) -> Shapes:
    source, target, hidden = architecture.source_dimension, architecture.target_dimension, architecture.hidden
    side = architecture.side_dimension or source
    shapes: Shapes = {}
    for prefix, inputs, width in (
        ("old.0", source, 2 * source),
        ("old.1", 2 * source, 2 * target),
        ("side.0", side, 2 * side),
        ("side.1", 2 * side, 2 * target),
        ("mixer.0", 4 * target, hidden),
        ("mixer.1", hidden, hidden),
    ):
        shapes[f"{prefix}.weight"] = (width, inputs)
        shapes |= _norm_tensors(prefix, width, "batch")
    shapes["mixer.2.weight"] = (target, hidden)
    shapes["mixer.2.bias"] = (target,)
    shapes["uncertainty.weight"] = (1, target)
    shapes["uncertainty.bias"] = (1,)
    return shapes


def _norm_tensors(prefix: str, width: int, norm: str | None) -> Shapes:
    parts = {"batch": ("weight", "bias", "running_mean", "running_var"), "layer": ("weight", "bias"), None: ()}[norm]
    return {f"{prefix}.norm.{part}": (width,) for part in parts}


def _construct(kind: type[_Declared], values: Mapping[str, Any]) -> _Declared:
    known = {field.name for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    unknown, missing = sorted(values.keys() - known), sorted(needed - values.keys())
    if unknown:
        raise InvalidArchitecture(f"unknown field {unknown[0]!r}")
    if missing:
        raise InvalidArchitecture(f"the field {missing[0]!r} is missing")
    return kind(**values)


def _object(what: str, declared: object) -> Mapping[str, object]:
    if not isinstance(declared, dict) or not all(isinstance(key, str) for key in declared):
        raise InvalidArchitecture(f"{what} must be an object, not {type(declared).__name__}")
    return declared


def _check_integer(name: str, value: object, limit: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise InvalidArchitecture(f"{name} must be an integer from 1 to {limit}, not {value!r}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidArchitecture(f"{name} must be true or false, not {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise InvalidArchitecture(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
