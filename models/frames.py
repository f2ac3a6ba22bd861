"""Where a model's vectors lie and how far apart they are, so that training does not depend on it.

Adam's steps have the same length whatever the unit of the vectors is. So it learns a map between vectors that differ by about
1, and in the same number of steps does not learn it between the same vectors in a smaller unit: on CIFAR-100's embeddings, the
residual MLP's CMC-1 fell from 0.42 to 0.31 in an eighth of the unit, and to 0.01 in a hundredth.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.evaluation import Metric
from models.moments import mean_row, spread, unit
from models.transformations import Fct, Linear, Mlp, Transformation, build, optional_tensors

Tensors = dict[str, Tensor]


class Frame(nn.Module):
    """A mean that is subtracted, and a scale that is divided by: 0 and 1 until vectors are measured.

    Under cosine each row is made a unit vector first. The mean is then what all vectors have in common, and that may be almost
    all of each vector.
    """

    mean: Tensor
    scale: Tensor
    #: how far from their mean vectors are in the frame, as a root mean square
    deviation: Tensor

    def __init__(self, dimension: int, *, metric: Metric = "euclidean") -> None:
        super().__init__()
        self.directions = metric == "cosine"
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("deviation", torch.ones(()))

    def measure(self, vectors: Tensor, *, kept: float = 0.0, deviation: float | None = 1.0) -> None:
        """Fit the frame to vectors (n, dimension).

        Args:
            vectors: if they are all the same, the scale stays 1.
            kept: the most that they keep of their mean: its length, in units of their root mean square distance from it.
            deviation: the root mean square distance from their mean, over all elements, that they have in the frame. None: the
                one that gives them a root mean square length of 1.
        """
        mean = mean_row(vectors, normalize=self.directions)
        apart = math.sqrt(spread(vectors, mean, normalize=self.directions) / len(vectors))
        length = float(torch.linalg.vector_norm(mean))
        left = min(length, kept * apart)
        if deviation is None:
            deviation = apart / math.hypot(apart, left) / math.sqrt(len(mean))
        self.mean.copy_(mean * (1 - left / length if length > 0 else 1.0))
        self.scale.fill_(apart / math.sqrt(len(mean)) / deviation if apart > 0 else 1.0)
        self.deviation.fill_(deviation)

    def forward(self, vectors: Tensor) -> Tensor:
        """Bring vectors (n, dimension) into the frame."""
        return ((unit(vectors) if self.directions else vectors) - self.mean) / self.scale

    def back(self, vectors: Tensor) -> Tensor:
        """Undo `forward`, except for the lengths that were lost where it made rows unit vectors."""
        return vectors * self.scale + self.mean

    def landed(self, output: Tensor) -> Tensor:
        """Return a map's output (n, dimension) as it is once it was normalised, seen in the frame; only cosine changes it."""
        return self(self.back(output)) if self.directions else output


def between(module: Transformation, source: Frame, target: Frame, side: Frame | None = None) -> Transformation:
    """Turn a map that was trained from frame to frame into one between vectors as they are stored.

    With h the module it is v -> target.back(h(source(v), side(s))), in h's own architecture: the frames are folded into its
    first and last layers.

    Args:
        module: linear without means, an MLP whose first and last layers have no norm, or FCT's network. It normalises nothing
            itself; what is returned normalises as the frames do.
        source, target: of the embeddings, and of what they are mapped to.
        side: of the side-information; FCT without it feeds its second branch from the source.

    Returns:
        A new module on the frames' device. Frames that were not measured change nothing, and add no tensor.
    """
    architecture = replace(module.architecture, normalize_input=source.directions, normalize_output=target.directions)
    device = source.mean.device  # a method may have made the module just now, on the CPU
    tensors = {name: tensor.detach().to(device).double().clone() for name, tensor in module.state_dict().items()}
    match architecture:
        case Linear():
            _read(tensors, "", source)
            _written(tensors, "", target)
        case Mlp():
            _mlp(tensors, architecture, source, target)
        case Fct():
            _fct(tensors, source, target, source if side is None else side)
        case _:
            raise TypeError(f"no map of kind {architecture.kind!r} is trained")
    made = build(architecture, optional=optional_tensors(architecture).keys() & tensors.keys())
    made.load_state_dict(tensors)
    return made.to(device).train(module.training)


def _fct(tensors: Tensors, source: Frame, target: Frame, side: Frame) -> None:
    for branch, frame in (("old.0", source), ("side.0", side)):
        weight = tensors[f"{branch}.weight"] / frame.scale
        tensors[f"{branch}.weight"] = weight
        tensors[f"{branch}.norm.running_mean"] += weight @ frame.mean.double()
    _written(tensors, "mixer.2.", target)
    if "uncertainty.weight" in tensors:  # it reads h's output, which was in the target's frame, at a deviation of 1
        tensors["uncertainty.weight"] /= target.deviation
        _read(tensors, "uncertainty.", target)


def _mlp(tensors: Tensors, architecture: Mlp, source: Frame, target: Frame) -> None:
    if architecture.residual and not (_is_plain(source) and _is_plain(target)):
        # without `skip.weight` the input is added as it is; it too must go from frame to frame, so it gets a weight
        tensors.setdefault("skip.weight", torch.eye(architecture.target_dimension).to(source.mean).double())
    _read(tensors, "layers.0.", source)
    _written(tensors, f"layers.{len(architecture.layers) - 1}.", target)
    if "skip.weight" in tensors:
        _read(tensors, "skip.", source)
        for name in ("skip.weight", "skip.bias"):
            if name in tensors:
                tensors[name] *= target.scale


def _read(tensors: Tensors, layer: str, frame: Frame) -> None:
    """W (v - mean) / scale + b = (W / scale) v + (b - W mean / scale)."""
    weight = tensors[f"{layer}weight"] / frame.scale
    tensors[f"{layer}weight"] = weight
    _add(tensors, f"{layer}bias", -weight @ frame.mean.double())


def _written(tensors: Tensors, layer: str, frame: Frame) -> None:
    """(W v + b) scale + mean = (scale W) v + (scale b + mean)."""
    for name in (f"{layer}weight", f"{layer}bias"):
        if name in tensors:
            tensors[name] *= frame.scale
    _add(tensors, f"{layer}bias", frame.mean.double())


def _add(tensors: Tensors, bias: str, what: Tensor) -> None:
    if bias in tensors or what.any():
        tensors[bias] = tensors.get(bias, 0) + what


def _is_plain(frame: Frame) -> bool:
    return not frame.mean.any() and frame.scale.item() == 1
