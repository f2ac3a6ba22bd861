"""Lambda-orthogonality (Ricci, Biondi, Pernici, Patras, Del Bimbo; NeurIPS 2025)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from models.frames import Frame, between
from models.method import Batch, Method, Setting, Transformations, check_range, needed
from models.methods.procrustes import nearest_isometry, relative_scale
from models.moments import cross_moment
from models.pairs import check_pairs, linear_maps, pair_plan
from models.plan import Plan
from models.transformations import MAX_WIDTH, LayerSpec, Mlp, Transformation, build, optional_tensors

SMALLEST = 1e-2  # singular values of B below this share of the largest: the inverse does not bring back what B has all but erased


class LambdaOrthogonality(Method):
    """Learns B: new -> old, (nearly) orthogonal so that it keeps what the new model knows, and F: old -> B(new) towards it.

    L = w_B |B(n) - o|^2 + w_F |F(o) - B(n)|^2 + w_C (supcon(F(o), B(n)) + supcon(F(o), o)) + L_lambda. Without labels each
    pair is a class of its own. All of it is learned in the models' frames, where squares are divided by the old space's
    variance, so that the weights mean the same whether vectors are long or short, and near each other or not.

    B strict is exp(A) with A skew-symmetric: a rotation, no bias. B relaxed is affine, W v + b, and then
    L_lambda = sigmoid(alpha (x - lambda)) x with x = |W^T W - I|_F, which is |W W^T - I|_F where W is square. Relaxed B sees new
    vectors multiplied by Procrustes' `scale`, so that a nearly orthogonal W fits them whatever the unit of either model;
    exported, the factor is in W. Strict B sees both models in one unit, the old one's, and with their means, which it has no bias
    to bring together.

    Both are learned in the larger of the two widths, D; old vectors are padded with zeros. A query for the old gallery is B(n)
    cut to d_old dimensions: the authors truncate too, and here B turns the vectors first. If the loss compared only d_old
    dimensions, B would choose those in which new vectors are short.

    B starts as the Procrustes solution and F as the identity: from a random start a few hundred pairs are not enough, and
    exp(A) never turns a reflection into a rotation.

    The authors keep F(o) in the gallery and search it with B(n). A forward map must land in the new model's own space, so
    here F is followed by the inverse of B, W^+ (F(o) - b), folded into its last layer and skip. Where B is strict that gives
    the authors' scores exactly if d_new >= d_old; if not, the part of F(o) that no B(n) can reach is lost. Where B is
    relaxed the two agree as far as W is orthogonal.
    """

    name: ClassVar[str] = "lambda_orthogonality"

    def __init__(
        self,
        setting: Setting,
        *,
        strict: bool = False,
        threshold: float | None = None,
        sharpness: float = 1.0,
        backward_weight: float = 1.0,
        forward_weight: float = 1.0,
        contrastive_weight: float = 0.1,
        temperature: float = 0.1,
        hidden: int = 256,
    ) -> None:
        """Make fresh maps; `prepare` gives them their start.

        Args:
            setting: the two widths, and the metric.
            strict: B is a rotation; otherwise affine.
            threshold: lambda, how far from orthogonal W may be. None: a tenth of the square root of d_new. The authors' 12,
                best on CUB, bounds nothing in a narrow space: at 128 dimensions W = 0 is only 11.3 away.
            sharpness: alpha; the authors' is not known, nor are their weights and temperature.
            backward_weight, forward_weight, contrastive_weight: w_B, w_F, w_C.
            temperature: of the contrastive terms.
            hidden: width of F, which is o + W2 GELU(W1 o + b1) + b2; where it must widen o the skip is linear.

        Raises:
            ValueError: a hyperparameter out of range.
        """
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        check_range(1, MAX_WIDTH, hidden=hidden)
        check_range(
            0,
            threshold=threshold or 0,
            sharpness=sharpness,
            backward_weight=backward_weight,
            forward_weight=forward_weight,
            contrastive_weight=contrastive_weight,
        )
        super().__init__(setting)
        old, new = setting.old_dimension, setting.new_dimension
        self.strict = strict
        self.threshold = 0.1 * math.sqrt(new) if threshold is None else threshold
        self.sharpness = sharpness
        self.weights = {"backward": backward_weight, "forward": forward_weight, "contrastive": contrastive_weight}
        self.width = max(old, new)
        self.to_old = nn.Linear(new, self.width, bias=not strict)
        nn.init.orthogonal_(self.to_old.weight)
        if strict:
            orthogonal(self.to_old, orthogonal_map="matrix_exp")
        layers = (LayerSpec(width=hidden, activation="gelu"), LayerSpec(width=self.width))
        self.shape = Mlp(source_dimension=old, target_dimension=self.width, layers=layers, residual=True)
        self.towards = build(self.shape, optional=("layers.0.bias", "layers.1.bias"))
        self.contrast = SupConLoss(temperature=temperature, reducer=MeanReducer())
        self.old_frame, self.new_frame = Frame(old, metric=setting.metric), Frame(new, metric=setting.metric)

    def prepare(self, rows: Batch) -> None:
        """Measure both spaces, and start B as the Procrustes solution and F as the identity."""
        check_pairs(rows, self.setting)
        old, new = needed(rows.old, "old"), needed(rows.new, "new")
        kept = math.inf if self.strict else 0.0
        self.old_frame.measure(old, kept=kept)
        self.new_frame.measure(new, kept=kept)
        centres = self.new_frame.mean.double(), self.old_frame.mean.double()
        normalize = self.setting.metric == "cosine"
        moment = cross_moment(new, old, centres, normalize=normalize)
        isometry = nearest_isometry(moment)
        scale = 1.0 if self.strict else relative_scale(new, old, centres, isometry, normalize=normalize)
        self.new_frame.scale.copy_(self.old_frame.scale / scale)
        self._start(nearest_isometry(self._padded(moment)).T.to(old))

    @torch.no_grad()
    def _start(self, weight: Tensor) -> None:
        if self.strict:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # torch draws what completes a rectangle to a square
                self.to_old.weight = weight
        else:
            self.to_old.weight.copy_(weight)
            self.to_old.bias.zero_()
        for name, tensor in self.towards.state_dict().items():
            if name.startswith("layers.1."):
                tensor.zero_()
            if name == "skip.weight":
                nn.init.eye_(tensor)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `backward`, `forward`, `contrastive`, and where B is relaxed `orthogonality`."""
        old, new = self.old_frame(needed(batch.old, "old")), self.new_frame(needed(batch.new, "new"))
        old, back, towards = self._padded(old), self.to_old(new), self.towards(old)
        terms = {
            "backward": (back - old).square().sum(dim=1).mean() / self.setting.old_dimension,
            "forward": (towards - back).square().sum(dim=1).mean() / self.setting.old_dimension,
            "contrastive": self._contrast(towards, back, batch.labels) + self._contrast(towards, old, batch.labels),
        }
        losses = {name: self.weights[name] * term for name, term in terms.items()}
        if not self.strict:
            apart = deviation(self.to_old.weight)
            losses["orthogonality"] = gate(apart, threshold=self.threshold, sharpness=self.sharpness) * apart
        return losses

    def _contrast(self, anchors: Tensor, others: Tensor, labels: Tensor | None) -> Tensor:
        """Return the mean over anchors i, and over all j of i's class, of -log softmax_j(cos(a_i, b_j) / temperature)."""
        classes = torch.arange(len(anchors), device=anchors.device) if labels is None else labels
        # A copy of the labels: from the same tensor the library concludes that i and i are one vector, and no pair.
        loss: Tensor = self.contrast(anchors, classes, ref_emb=others, ref_labels=classes.clone())
        return loss

    def _padded(self, old: Tensor) -> Tensor:
        """Pad old vectors (..., d_old) with zeros to (..., D)."""
        return F.pad(old, (0, self.width - self.setting.old_dimension))

    def transformations(self) -> Transformations:
        weight = self.to_old.weight.detach().double()
        bias = torch.zeros_like(weight[:, 0]) if self.strict else self.to_old.bias.detach().double()
        old, new = self.setting.old_dimension, self.setting.new_dimension
        backward = linear_maps("bias")(new, old)
        backward.load_state_dict({"weight": weight[:old], "bias": bias[:old]})
        return Transformations(
            forward=between(self._inverted(weight, bias), self.old_frame, self.new_frame),
            backward=between(backward, self.new_frame, self.old_frame),
        )

    def _inverted(self, weight: Tensor, bias: Tensor) -> Transformation:
        """Return W^+ (F(o) - b) as one MLP."""
        inverse = torch.linalg.pinv(weight, rtol=SMALLEST)
        tensors = {name: tensor.detach().double() for name, tensor in self.towards.state_dict().items()}
        tensors["layers.1.weight"] = inverse @ tensors["layers.1.weight"]
        tensors["layers.1.bias"] = inverse @ (tensors["layers.1.bias"] - bias)
        tensors["skip.weight"] = inverse @ tensors.get("skip.weight", torch.eye(self.width).to(inverse))
        width = self.setting.new_dimension
        shape = replace(self.shape, target_dimension=width, layers=(self.shape.layers[0], LayerSpec(width=width)))
        made = build(shape, optional=optional_tensors(shape).keys() & tensors.keys())
        made.load_state_dict(tensors)
        return made

    @classmethod
    def plan(cls, rows: int) -> Plan:
        """FCT's plan at the authors' rate, 1e-3. Batches stay small: the contrastive terms cost their square."""
        plan = pair_plan(rows, learning_rate=1e-3)
        return replace(plan, batch=min(256, plan.batch))


def deviation(weight: Tensor) -> Tensor:
    """Return how far a matrix (a, b), a >= b, is from having orthonormal columns: |W^T W - I|_F."""
    apart: Tensor = torch.linalg.vector_norm(weight.T @ weight - torch.eye(weight.shape[1]).to(weight))
    return apart


def gate(apart: Tensor, *, threshold: float, sharpness: float) -> Tensor:
    """Return sigmoid(alpha (x - lambda)): a half at the threshold, nothing far below it, one far above."""
    return torch.sigmoid(sharpness * (apart - threshold))
